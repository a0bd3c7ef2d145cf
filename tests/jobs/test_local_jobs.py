"""Jobs of submitit's local executor: interrupted, cancelled and killed like those on a cluster."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowjobs.jobs.current_job import running_job
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.jobs.disturbed import OPTIONS, REPOSITORY, assert_equal_to, assert_in_wandb

LOCAL = ("--name", "local", "--cluster", "local", "--no-follow")


@pytest.fixture
def run(flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run that trains as a local job, and does not end before it is told to leave or killed."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # What a person has set for submitit's other users does not reach a job of ours.
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "SIGUSR1")
    Path("control").write_text("await 25")
    submit(flowjobs)
    run = Run(study, "local")
    assert "local job" in str(running_job(run))  # before it has the lock
    wait_until(lambda: len(list(read_rows(run.metrics_file))) > 1, "the run to train", 120)
    yield run
    Path("control").unlink(missing_ok=True)


def submit(flowjobs: Command, *options: str) -> str:
    done = flowjobs("submit", *OPTIONS, *LOCAL, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def let_go() -> None:
    """The next start is on its own; this one has been told to leave, or may have been already."""
    Path("control").unlink(missing_ok=True)


def status_of(run: Run) -> RunStatus:
    return run.status()


def wait_for(run: Run, state: str) -> None:
    wait_until(lambda: status_of(run).state == state, state, 60, lambda: str(status_of(run)))


def test_a_time_limit_starts_the_job_again_at_once(run: Run, whole: Run) -> None:
    # What is cancelled is unknown as it leaves: as a file server that fails over has it.
    run.cancel_file.symlink_to(run.cancel_file)
    os.kill(status_of(run).attempts[-1].job.pid, signal.SIGUSR2)
    wait_for(run, "preempted")
    Path("control").write_text("await 0")  # the next start, too
    run.cancel_file.unlink()
    wait_until(lambda: len(status_of(run).attempts) == 2, "the next start", 60)
    os.kill(status_of(run).attempts[-1].job.pid, signal.SIGUSR2)
    let_go()
    wait_for(run, "finished")
    unknown, first, second = status_of(run).attempts
    assert (unknown.state, unknown.kind) == ("preempted", "preempted")
    assert unknown.reason.startswith("told to leave (SIGUSR2); saved at step")
    assert (first.state, first.kind) == ("preempted", "time limit")
    assert (first.first_step, second.first_step) == (unknown.last_step, first.last_step)
    assert second.job.restart_count == 2
    assert_equal_to(whole, run)


def test_cancel_ends_the_job_and_the_next_one_starts_once_it_has_left(
    run: Run, flowjobs: Command, whole: Run
) -> None:
    Path("control").write_text("hold")  # in a step that takes long
    done = flowjobs("cancel", "local")
    assert done.returncode == 0, done.stderr
    assert f"cancelled local job {run.submissions()[-1].job_id} on " in done.stdout
    assert "nothing to cancel" not in flowjobs("cancel", "local").stdout
    again = [sys.executable, "-m", "flowjobs", "submit", *OPTIONS, *LOCAL]
    with subprocess.Popen(again, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert waiting.stderr.readline().startswith("waiting for local job")
        assert run.cancel_requested()
        let_go()
        assert waiting.wait(240) == 0
    wait_for(run, "finished")
    assert [attempt.state for attempt in status_of(run).attempts] == ["cancelled", "finished"]
    assert_equal_to(whole, run)
    assert "is finished; there is nothing to cancel" in flowjobs("cancel", "local").stdout


def test_a_killed_job_is_shown_as_dead_is_closed_and_goes_on_when_submitted(
    run: Run, flowjobs: Command, whole: Run
) -> None:
    pid = status_of(run).attempts[-1].job.pid
    os.kill(pid, signal.SIGKILL)
    let_go()
    reached = [row["step"] for row in read_rows(run.metrics_file)][-1]
    wait_until(lambda: "failed" in flowjobs("status", "local").stdout, "status to notice", 120)
    assert status_of(run).state == "running"  # looking has changed nothing
    assert "local: failed: died silently" in flowjobs("reconcile").stdout
    status = status_of(run)
    assert (status.state, status.exit_code) == ("failed", 1)
    assert status.reason.startswith("died silently (as after SIGKILL or os._exit) on")
    assert f"attempt 1, step {reached}" in status.reason
    assert status.attempts[0].last_step == reached
    shown = f"steps 0 to {reached}, failed: died silently"
    assert shown in flowjobs("status", "local").stdout
    assert_in_wandb(run, "failed", 1, status.reason)
    assert flowjobs("reconcile").stdout == ""  # nothing is left to close
    submit(flowjobs)
    wait_for(run, "finished")
    assert shown in flowjobs("status", "local").stdout  # though the rows came again
    assert_equal_to(whole, run)
