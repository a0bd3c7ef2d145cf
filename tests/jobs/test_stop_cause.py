"""What a signal meant and how long there is, by the record that the real Slurm has of the job."""

import signal
from collections.abc import Callable
from pathlib import Path

from flowjobs.config import RunConfig
from flowjobs.jobs.stop_cause import Notice, notice_of
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.slurm.cluster import kill_wait_s
from flowjobs.slurm.controller import job_record
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until


def running_job(slurm: SlurmCluster) -> str:
    ignore = "trap '' TERM; sleep 600"
    job_id = slurm.submit("-p", "preempt", "-w", "n1", "--output=/dev/null", "--wrap", ignore)
    slurm.wait_state(job_id, "RUNNING")
    return job_id


def notice(study: Path, job_id: str) -> Notice:
    run = Run(study, "a")
    run.create(RunConfig())
    return notice_of(run, JobInfo("slurm", job_id, None, "n1", 1), signal.SIGTERM)


def test_a_preempted_job_without_a_time_limit_has_a_known_time_to_leave(
    slurm: SlurmCluster, study: Path
) -> None:
    job_id = running_job(slurm)
    slurm.run("scontrol", "update", f"jobid={job_id}", "timelimit=UNLIMITED")
    assert notice(study, job_id).kind == "told to leave"
    slurm.preempt("n1")

    def preempted() -> bool:
        record = job_record(job_id)
        return record is not None and record.preempted

    wait_until(preempted, "the preemption", 600)
    # Of such a job Slurm says nothing of the grace either.
    assert slurm.job(job_id)["EndTime"] == "Unknown"
    found = notice(study, job_id)
    assert (found.kind, found.seconds_left) == ("preempted", kill_wait_s())


def test_a_cancelled_job_that_was_suspended_has_not_reached_its_limit(
    slurm: SlurmCluster, site: Callable[[str, str], None], study: Path
) -> None:
    job_id = running_job(slurm)
    # As if it had begun long ago, and had stood still since.
    long_ago = "s/StartTime=[^ ]* EndTime/StartTime=2020-01-01T00:00:00 EndTime/"
    site("scontrol", f'$real "$@" | sed "{long_ago}"')
    slurm.run("scancel", job_id)
    slurm.wait_state(job_id, {"COMPLETING", "CANCELLED"})
    assert notice(study, job_id).kind == "cancelled"
