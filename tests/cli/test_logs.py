"""`logs -f` on a run whose attempts are played by the test, as jobs would leave them on disk."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowjobs.cli.follow import LAST_WORDS_S
from flowjobs.cli.main import run as run_command
from flowjobs.config import RunConfig
from flowjobs.errors import RunInterrupted, RunNotFoundError
from flowjobs.jobs.cancel import cancel
from flowjobs.runs.attempt import Attempt
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from tests.cluster.waiting import wait_until


class Following:
    """`flowjobs logs -f RUN` in a process of its own; what it prints goes to a file."""

    def __init__(self, name: str, output: Path) -> None:
        self._output = output
        command = [sys.executable, "-m", "flowjobs", "logs", "-f", name]
        with output.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file)

    def printed(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.printed(), f"{text!r}", timeout_s=600, explain=self.printed)

    def outlives_last_words(self, log: Path) -> str:
        """Adds lines for longer than it waits for last words, which it reads. Returns them."""
        end, added, late = time.monotonic() + 2 * LAST_WORDS_S, "", 0
        while late < 3:  # each takes another look
            late += time.monotonic() > end
            line = f"line {len(added)}"
            add(log, line)
            added += f"{line}\n"
            self.wait_for(added)
        return added


@pytest.fixture
def run(study: Path) -> Run:
    run = Run(study, "a")
    run.create(RunConfig())
    return run


@pytest.fixture
def following(run: Run, tmp_path: Path) -> Iterator[Following]:
    following = Following(run.name, tmp_path / "printed")
    yield following
    following.process.kill()
    following.process.wait()


def submit_job(run: Run, job_id: str) -> tuple[JobInfo, Path]:
    log = run.logs / f"{job_id}_0_log.out"
    run.add_submission(job_id, "local", log)
    return JobInfo("local", job_id, str(log), "here", os.getpid()), log


def add(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")


def test_follows_a_run_that_starts_later_to_its_end(run: Run, following: Following) -> None:
    job, log = submit_job(run, "1")
    with Attempt(run, job):
        add(log, "first")
        following.wait_for("first\n")
        add(log, "second")
        following.wait_for("first\nsecond\n")
        assert following.process.poll() is None
        log.write_text("cut\n")  # short, as on a full disk
        following.wait_for("second\ncut\n")
        with log.open("ab", buffering=0) as file:  # a character in two writes
            file.write(b"50 \xe2\x96")
            following.wait_for("cut\n50 ")
            file.write("█ of\n".encode()[2:])
    add(log, "the last words")
    assert following.process.wait(timeout=400) == 0
    assert following.printed() == "first\nsecond\ncut\n50 █ of\nthe last words\n"


def test_goes_on_with_the_log_of_the_next_attempt(run: Run, following: Following) -> None:
    job, log = submit_job(run, "1")

    def preempted() -> None:
        with Attempt(run, job):
            add(log, "one")
            following.wait_for("one\n")
            raise RunInterrupted("preempted", 7)

    with pytest.raises(RunInterrupted):
        preempted()
    lines = following.outlives_last_words(log)

    again, next_log = submit_job(run, "2")
    with Attempt(run, again):
        add(next_log, "two")
        following.wait_for("two\n")
        # A word of the scheduler about the first job makes its log the newer file for a moment.
        add(log, "one more")
        following.wait_for("one more\n")
        add(next_log, "three")
        following.wait_for("three\n")
    assert following.process.wait(timeout=400) == 0
    assert following.printed() == f"one\n{lines}two\none more\nthree\n"


def test_ends_with_a_job_that_is_cancelled_before_it_begins(
    run: Run, following: Following, tmp_path: Path
) -> None:
    submit_job(run, "1")
    cancel(run)
    assert following.process.wait(timeout=400) == 0
    run.clear_cancel()
    job, log = submit_job(run, "2")
    add(log, "one")
    with pytest.raises(KeyboardInterrupt), Attempt(run, job):
        raise KeyboardInterrupt
    submit_job(run, "3")
    cancel(run)
    again = Following(run.name, tmp_path / "again")
    assert again.process.wait(timeout=400) == 0
    assert again.printed() == "one\n"


def test_a_run_that_was_trained_from_python_has_no_log(run: Run, study: Path) -> None:
    with Attempt(run, JobInfo.in_foreground()):
        pass
    for options in ([], ["-f"], ["--attempt", "1"], ["--attempt", "1", "--rank", "1"]):
        with pytest.raises(RunNotFoundError, match="a has no log: it was trained from Python"):
            run_command(["logs", "a", *options])
    submit_job(run, "1")
    with pytest.raises(RunNotFoundError, match="a has no log yet: its job has not started"):
        run_command(["logs", "a"])


def test_waits_for_a_job_that_was_submitted_after_the_end(run: Run, tmp_path: Path) -> None:
    def failed() -> None:
        job, log = submit_job(run, "1")
        with Attempt(run, job):
            add(log, "one")
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        failed()
    assert Following(run.name, tmp_path / "of the ended").process.wait(timeout=400) == 0
    job, log = submit_job(run, "2")
    following = Following(run.name, tmp_path / "printed")
    following.wait_for("one\n")
    lines = following.outlives_last_words(log)
    with Attempt(run, job):
        add(log, "two")
    assert following.process.wait(timeout=400) == 0
    assert following.printed() == f"one\n{lines}two\n"


def test_the_newest_log_is_told_by_the_record_and_not_by_the_times_of_files(
    run: Run, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, job_id in enumerate(("999", "1000", "1001")):
        job, log = submit_job(run, job_id)
        add(log, f"output of job {job_id}")
        os.utime(log, (1000 - number,) * 2)  # as a copy may leave them
        if job_id != "1001":  # it died before its attempt
            with Attempt(run, job):
                pass
    run_command(["logs", "a"])
    assert capsys.readouterr().out == "output of job 1001\n"

    # Moved, from a place that cannot be looked into.
    for file in run.jobs_file, run.status_file:
        file.write_text(file.read_text().replace(str(study), f"/{'x' * 300}"))
    run_command(["logs", "a", "--attempt", "2"])
    run_command(["logs", "a"])
    assert capsys.readouterr().out == "output of job 1000\noutput of job 1001\n"


def test_a_log_may_be_larger_than_the_memory(run: Run) -> None:
    log = submit_job(run, "1")[1]
    add(log, "one")
    os.truncate(log, 4 << 30)  # sparse
    command = f"ulimit -v 2000000; {sys.executable} -m flowjobs logs a | head -n 1"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == ("one\n", "")
