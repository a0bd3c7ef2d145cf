"""Who holds a run, by Slurm's word, where nothing else tells; on the real Slurm."""

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrackingConfig
from flowjobs.jobs.lock_judge import job_verdict
from flowjobs.jobs.origin import Origin
from flowjobs.jobs.reconcile import reconcile
from flowjobs.jobs.restart import restart
from flowjobs.jobs.tasks import task_of
from flowjobs.runs.lock import RunLock
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, RunStatus, now
from flowjobs.slurm.sacct import accounting
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.jobs.disturbed import OPTIONS, REPOSITORY, Disturbed, Start
from tests.jobs.test_reconcile import kill_with_its_batch_shell
from tests.runs.no_flock import no_flock

__all__ = ["no_flock"]


@contextlib.contextmanager
def completing(slurm: SlurmCluster, tell: Callable[[str], object] | None = None) -> Iterator[str]:
    """A job that has been told to end, and does not: its node's step daemon does not answer."""
    job_id = slurm.submit("--output=/dev/null", "-w", "n4", "--wrap", "sleep 600")
    slurm.wait_state(job_id, "RUNNING")

    def daemon() -> int | None:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_text(errors="replace")
                if command.startswith("slurmstepd") and f"[{job_id}.batch]" in command:
                    return int(process.name)
        return None

    pid = wait_until(daemon, "the step's daemon", 120)
    os.kill(pid, signal.SIGSTOP)
    try:
        if tell:
            tell(job_id)
        else:
            slurm.run("scancel", job_id)
        slurm.wait_state(job_id, "COMPLETING")
        yield job_id
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_holder_that_stays_in_completing_is_waited_for_and_the_run_has_not_failed(
    slurm: SlurmCluster, flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = Path("impatient").absolute()
    impatient.mkdir()
    patch = "from flowjobs.runs import lock\nlock.LEAVING_WAIT_S = 2.0\n"
    (impatient / "sitecustomize.py").write_text(patch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(impatient), str(REPOSITORY)]))
    run = Run(study, "disturbed")
    run.logs.mkdir(parents=True)
    with completing(slurm) as holder:
        RunLock(run.folder, JobInfo("slurm", holder, None, "n4", 1)).__enter__()
        # At a terminal, too, where Slurm may not be asked.
        refusing = Path("bin").absolute()
        refusing.mkdir()
        for command in ("squeue", "scontrol"):
            (refusing / command).write_text("#!/bin/sh\necho 'not on login nodes' >&2\nexit 1\n")
            (refusing / command).chmod(0o755)
        with monkeypatch.context() as patched:
            patched.setenv("PATH", f"{refusing}{os.pathsep}{os.environ['PATH']}")
            done = flowjobs("train", *OPTIONS, "--name", "disturbed")
        assert done.returncode == 75, done.stderr
        assert f"for slurm job {holder} on n4 (process 1), which may not have ended" in done.stderr
        assert "Traceback" not in done.stderr

        assert flowjobs("submit", *OPTIONS, "--name", "disturbed").returncode == 0
        (entry,) = run.submissions()
        job = Disturbed(run, entry.job_id, slurm)
        # It does not hold its GPU while it waits, and nobody calls the run failed.
        wait_until(
            lambda: slurm.job(job.job_id)["Restarts"] != "0", "the requeue", 120, job.explain
        )
        assert re.search(rf"waited \d+ s for slurm job {holder} .* has not ended yet", job.logs())
        assert job.attempts() == []
        assert job.status().state == "submitted"
    job.wait_for_state("finished")
    assert len(job.attempts()) == 1


def test_a_start_that_slurm_requeues_keeps_its_run_until_its_processes_are_gone(
    slurm: SlurmCluster, site: Callable[[str, str], None], study: Path
) -> None:
    run = Run(study, "a")
    run.create(RunConfig(tracking=TrackingConfig(wandb_mode="disabled")))
    # The answer is lost, and not the request: that is no reason to submit another job.
    lost = "echo 'slurm_requeue error: Socket timed out' >&2; exit 1"
    site("scontrol", f'[ "$1" = requeue ] && {{ $real "$@"; {lost}; }}; $real "$@"')

    def leave(job_id: str) -> None:
        job = JobInfo("slurm", job_id, None, "n4", 1)
        run.add_submission(job_id, "slurm", None)
        Origin.here(run.asked()).note(run, job_id)
        RunStatus("running", attempts=[AttemptRecord(1, job, now())]).write(run.status_file)
        restart(run, job, task_of(run))

    with completing(slurm, leave) as job_id:
        assert [entry.job_id for entry in run.submissions()] == [job_id]
        assert slurm.job(job_id)["Restarts"] == "1"
        wait_until(
            lambda: accounting({job_id: 0})[0].state == "REQUEUED", "accounting to know it", 60
        )
        assert job_verdict(run, run.status().attempts[0].job) == "leaving"
        assert reconcile([run]) == []
    slurm.wait_state(job_id, "PENDING", 240)
    (closed,) = reconcile([run])
    assert closed.outcome is not None
    assert closed.outcome.state == "preempted"


@pytest.mark.parametrize("no_flock", ["ENOLCK"], indirect=True)
@pytest.mark.usefixtures("no_flock")
def test_where_there_are_no_locks_a_dead_job_does_not_block_its_run(
    start: Start, flowjobs: Command
) -> None:
    job = start()
    kill_with_its_batch_shell(job)
    done = flowjobs("submit", *OPTIONS, "--name", "disturbed")
    assert "already has" not in done.stdout, done.stdout
    job.wait_for_state("finished")
    assert job.attempts() == [("failed", "killed"), ("finished", "")]
