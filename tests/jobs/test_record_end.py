"""What must not be recorded as dead, without Slurm: its commands would not be found."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import SubmissionError
from flowjobs.jobs import exit_cause
from flowjobs.jobs.cancel import cancel, cancel_together
from flowjobs.jobs.current_job import running_job
from flowjobs.jobs.dead_jobs import DeadJob, find_dead_jobs, version_of
from flowjobs.jobs.reconcile import handle_job_end, handle_pack_end, reconcile
from flowjobs.jobs.record_end import record_dead_attempt
from flowjobs.jobs.stop_cause import notice_of
from flowjobs.runs.attempt import Attempt
from flowjobs.runs.pack import new_pack
from flowjobs.runs.process import process_lives, process_mark
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    EXIT_BAD_INPUT,
    AttemptRecord,
    JobInfo,
    Outcome,
    RunStatus,
    now,
)
from flowjobs.slurm.client import SEPARATOR
from flowjobs.slurm.jobs import Unknown
from flowjobs.slurm.waiting import Waiting

DISABLED = TrackingConfig(wandb_mode="disabled")


@pytest.fixture
def run(study: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PATH", "")
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(epochs=1), tracking=DISABLED))
    return run


def test_a_job_that_came_too_late_does_not_fail_a_finished_run(run: Run) -> None:
    with Attempt(run, JobInfo.in_foreground()):
        pass
    run.add_submission("99", "slurm", None)
    assert reconcile([run]) == []
    assert run.finished()


def test_a_job_that_was_refused_says_nothing_of_the_run(run: Run) -> None:
    def train_and_fail() -> None:
        with Attempt(run, JobInfo.in_foreground()):
            run.add_submission("99", "slurm", None)
            time.sleep(1.1)  # times are in whole seconds
            raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        train_and_fail()
    assert reconcile([run]) == []


def test_a_job_that_was_submitted_after_a_failure_is_seen_though_a_node_is_ahead(run: Run) -> None:
    ahead = (datetime.now(UTC) + timedelta(seconds=40)).isoformat(timespec="seconds")
    on_node = JobInfo("slurm", "98", None, "n1", 1)
    failed = AttemptRecord(1, on_node, started=now(), ended=ahead, state="failed")
    RunStatus("failed", attempts=[failed]).write(run.status_file)
    for job_id in ("98", "99"):
        run.add_submission(job_id, "slurm", None, identity={"mark": job_id})
    assert [*find_dead_jobs([run])] == [run]  # Slurm is asked about it


def test_a_process_elsewhere_that_is_gone_is_unknown_and_no_longer_said_to_run(run: Run) -> None:
    attempt = Attempt(run, replace(JobInfo.in_foreground(), host="n5"))
    attempt.__enter__()
    assert find_dead_jobs([run]) == {}
    holder = run.folder / ".lock-holder.json"
    named = holder.read_bytes()
    attempt._stack.close()
    holder.write_bytes(named)  # as a kill would leave it
    assert (
        find_dead_jobs([run]) == {}
    )  # it may live, where a file system knows no locks between nodes
    assert running_job(run) is not None
    for file in (run.status_file, run.metrics_file):
        if file.exists():
            os.utime(file, (0, 0))
    assert isinstance(find_dead_jobs([run])[run], Unknown)
    assert run.status().state == "running"


def test_a_job_that_runs_without_an_attempt_is_no_job_that_waits_to_start(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = study / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    run.add_submission("7", "slurm", run.output_of("7"), identity={"job_name": "a"})
    uid, log = os.getuid(), run.logs / "%j_0_log.out"
    times = ("2026-01-01T10:00:00", "2026-01-02T10:00:00")
    cells = ("7", "RUNNING", uid, "c", *times, 0, "n7", 1, "None", times[0], "(null)", log, "a", "")
    squeue = commands / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{SEPARATOR.join(map(str, cells))}{SEPARATOR}'\n")
    squeue.chmod(0o755)
    why = "for its process to report: job 7 runs on n7 since 2026-01-01 10:00:00"
    assert find_dead_jobs([run]) == {run: Waiting(why)}
    # Nor is it said of one that was started again, by its attempt of before.
    job = JobInfo("slurm", "7", None, "n1", 1)
    left = AttemptRecord(1, job, now(), ended=now(), state="preempted")
    RunStatus("preempted", attempts=[left]).write(run.status_file)
    assert find_dead_jobs([run]) == {run: Waiting(why)}
    leaves = replace(left, job=replace(job, restart=1))
    RunStatus("preempted", attempts=[left, leaves]).write(run.status_file)
    assert find_dead_jobs([run]) == {}


def test_a_restart_that_never_began_is_not_taken_for_its_users_wish(run: Run) -> None:
    """Else restarts that come to nothing would not be counted, and go on for ever."""
    gone = {"host": socket.gethostname(), "process": "another boot"}
    for continues in (None, "999999998"):
        run.add_submission("999999999", "local", None, continues=continues, identity=gone)
        dead = find_dead_jobs([run])[run]
        assert isinstance(dead, DeadJob)
        assert dead.job.started_by_user is (continues is None)


def test_a_job_by_hand_that_was_refused_says_nothing_of_the_run(run: Run) -> None:
    own, mistyped = (JobInfo("slurm", job_id, None, "n1", 1) for job_id in ("11", "12"))
    with Attempt(run, JobInfo.in_foreground()):
        pass
    assert handle_job_end(run, mistyped, EXIT_BAD_INPUT) is None
    assert run.finished()
    # Nor while another job of the run waits to go on.
    run.add_submission("11", "slurm", None)
    left = AttemptRecord(1, own, now(), ended=now(), state="preempted")
    RunStatus("preempted", attempts=[left]).write(run.status_file)
    assert handle_job_end(run, mistyped, EXIT_BAD_INPUT) is None
    assert run.status().state == "preempted"
    # That one itself says something if it cannot begin.
    outcome = handle_job_end(run, replace(own, restart=1), 1)
    assert outcome is not None
    assert outcome.kind == "never started"
    assert run.status().state == "failed"


# As srun says it, with what else it prints then.
BUSY = (
    "srun: error: Unable to confirm allocation for job 12: Socket timed out on send/recv operation",
    "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 12",
)
REFUSED = (
    "srun: error: Task launch for StepId=12.0 failed on node n3: Job credential expired",
    "srun: error: Application launch failed: Job credential expired",
    "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
)
MISTAKE = (
    "srun: error: Unable to create step for job 12: More processors requested than permitted",
)


@pytest.mark.parametrize(
    ("said", "before", "expected", "node"),
    [
        (BUSY, 0, ("preempted", "launch failed"), None),
        (REFUSED, 3, ("preempted", "launch failed"), "n3"),
        (REFUSED, 4, ("failed", "launch failed"), "n3"),  # --give-up-after 5
        (MISTAKE, 0, ("failed", "never started"), None),
        ((*REFUSED, "00:00:00 I attempt 2 at a: …"), 0, ("failed", "never started"), None),
    ],
)
def test_a_step_that_slurm_could_not_launch_is_launched_again_a_few_times(
    run: Run, said: tuple[str, ...], before: int, expected: tuple[str, str], node: str | None
) -> None:
    log = run.logs / "12_0_log.out"
    log.write_text("\n".join(("00:00:00 I attempt 1 at a: slurm job 12 on n1", *said, "")))
    job = JobInfo("slurm", "12", str(log), "n1", 1, restart=before + 1)
    trained = AttemptRecord(1, job, now(), 0, 400, ended=now(), state="preempted")
    fruitless = [AttemptRecord(2, job, now(), ended=now(), state="preempted")] * before
    RunStatus("preempted", attempts=[trained, *fruitless]).write(run.status_file)
    run.add_submission("12", "slurm", log)
    outcome = handle_job_end(run, replace(job, restart=before + 2), 1)
    assert outcome is not None
    assert (outcome.state, outcome.kind) == expected
    assert said[0] in outcome.reason or outcome.kind == "never started"
    assert exit_cause.node_that_refused(job) == node


@pytest.mark.parametrize(("said", "closes"), [(BUSY, False), (MISTAKE, True)])
def test_nor_are_the_runs_of_a_pack_failed_that_slurm_could_not_launch(
    run: Run, said: tuple[str, ...], closes: bool
) -> None:
    pack = new_pack(run.study, "pack", [run], 2, run.asked())
    log = pack.logs / "12_0_log.out"
    log.write_text("\n".join(said))
    pack.add_submission("12", "slurm", log)
    closed = handle_pack_end(pack, JobInfo("slurm", "12", str(log), "n1", 1), exit_code=1)
    assert [*closed] == [run] * closes


def test_nothing_is_closed_once_another_attempt_has_begun(run: Run) -> None:
    killed = Outcome("failed", 137, "killed")
    first = JobInfo("slurm", "12", None, "n1", 1)
    dead = DeadJob(first, killed, version=(1, False, ""))
    attempt = Attempt(run, first)
    attempt.__enter__()
    attempt._stack.close()  # as a kill would leave it: no word, and the lock is free
    with Attempt(run, JobInfo.in_foreground()):
        assert record_dead_attempt(run, dead) is None
        status = run.status()
        assert status.state == "running"


def test_a_process_that_has_got_the_id_of_a_dead_one_is_not_the_runs(run: Run) -> None:
    before = replace(JobInfo.in_foreground(), process="an earlier boot:7")
    attempt = Attempt(run, before)
    attempt.__enter__()
    attempt._stack.close()  # as a kill would leave it
    (closed,) = reconcile([run])
    assert closed.outcome is not None
    assert closed.outcome.state == "failed"


@pytest.mark.skipif(os.geteuid() != 0, reason="to become another user needs root")
def test_nor_is_one_of_another_user_that_has_got_its_id() -> None:
    os.setresuid(65534, 65534, 0)
    try:
        lives = process_lives(1, "an earlier boot:7"), process_lives(1, process_mark(1))
    finally:
        os.setresuid(0, 0, 0)
    assert lives == (False, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace needs root")
def test_a_run_that_trains_lives_also_for_a_container_that_does_not_see_its_process(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowjobs.runs.lock.GLANCE_S", 0.1)
    container = ["/usr/bin/unshare", "--pid", "--fork", "--mount-proc", sys.executable]
    with Attempt(run, JobInfo.in_foreground()) as attempt:
        before = run.status_file.read_bytes()
        asked = [*container, "-m", "flowjobs", "reconcile", "a"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert run.status_file.read_bytes() == before
        # Nor where the one who asked has found it dead a moment before.
        killed = Outcome("failed", 137, "killed")
        dead = DeadJob(JobInfo.in_foreground(), killed, version_of(run.status()))
        assert record_dead_attempt(run, dead) is None
        attempt.check_held()


def test_cancel_ends_no_process_that_has_got_the_id_of_a_dead_one(run: Run) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as another:
        before = replace(JobInfo.in_foreground(), pid=another.pid, process="an earlier boot:7")
        attempt = Attempt(run, before)
        attempt.__enter__()
        # Whose it is, of this host's name but not among its processes, it cannot tell.
        with pytest.raises(SubmissionError, match=r"cannot be seen from here .* it is noted as"):
            cancel(run)
        attempt._stack.close()  # as a kill would leave it
        assert "no job of it waits or runs" in cancel(run)
        assert another.poll() is None
        another.kill()


def test_cancel_ends_a_run_that_is_trained_in_the_debugger(run: Run) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as process:
        here = replace(JobInfo.in_foreground(), cluster="debug", pid=process.pid)
        job = replace(here, process=process_mark(process.pid))
        with Attempt(run, job):
            assert cancel(run) == f"a: cancelled {job.description}; submit it again to resume"
        assert process.wait(240) == -signal.SIGTERM
    assert notice_of(run, job, signal.SIGTERM).kind == "cancelled"


def test_one_bad_run_keeps_no_other_from_being_cancelled(run: Run, study: Path) -> None:
    unread, unmarked, sound = run, Run(study, "b"), Run(study, "c")
    for other in (unmarked, sound):
        other.create(run.config())
    unread.jobs_file.symlink_to(unread.jobs_file.name)
    unmarked.cancel_file.mkdir()
    said = {run: str(words) for run, words in cancel_together([unread, unmarked, sound])}
    assert "its jobs are unknown" in said[unread]
    assert "it is noted as cancelled" in said[unread]
    assert "could not be noted as cancelled" in said[unmarked]
    assert said[sound] == "c: no job of it waits or runs; nothing will start it again"


def test_one_bad_run_of_a_pack_keeps_no_other_from_being_closed(run: Run, study: Path) -> None:
    waits, trains = Run(study, "b"), Run(study, "c")
    for other in (waits, trains):
        other.create(run.config())
    pack = new_pack(study, "pack", [run, waits, trains], 2, run.asked())
    pack.add_submission("7", "slurm", None)
    job = JobInfo("slurm", "7", None, "n1", 1)
    for training in (run, trains):
        status = RunStatus("running", attempts=[AttemptRecord(1, job, started=now())])
        status.write(training.status_file)
    run.cancel_file.symlink_to(run.cancel_file)
    closed = handle_pack_end(pack, job, exit_code=1)
    assert {each.name: outcome.kind for each, outcome in closed.items()} == {
        "b": "never started",
        "c": "exception",
    }
    run.cancel_file.unlink()
    status = run.status()
    assert (status.state, len(status.attempts)) == ("running", 1)  # `reconcile` closes it


def test_a_run_that_was_cancelled_before_its_first_start_does_not_start(run: Run) -> None:
    run.request_cancel()
    task = f"from flowjobs.jobs.entry import RunTask; RunTask({str(run.folder)!r})()"
    done = subprocess.run([sys.executable, "-c", task], capture_output=True, check=False)
    assert done.returncode == 130, done.stderr
    assert run.status() == RunStatus()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_run_that_could_not_begin_for_its_file_system_is_to_be_started_again(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(epochs=1), tracking=DISABLED))
    # A slot of a Slurm job; handle_job_end and record_end_of_slot start again what ends with 75.
    slot = {"FLOWJOBS_SLOTS": "2", "FLOWJOBS_JOB": "7", "SLURM_JOB_ID": "7"}
    read_only = f"mount --bind {study} {study} && mount -o remount,ro,bind {study} && exec "
    train = f"{sys.executable} -m flowjobs.jobs {run.folder}"
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", read_only + train],
        env={**os.environ, **slot, "SUBMITIT_EXECUTOR": "slurm"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert "Read-only file system" in done.stderr
    assert "nothing has begun, and the job is started again" in done.stderr
