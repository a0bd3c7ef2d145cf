"""What a signal meant and how long there is, by the record that the real Slurm has of the job."""

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from flowjobs.config import RunConfig
from flowjobs.jobs.stop_cause import Notice, notice_of
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.slurm.cluster import kill_wait_s
from flowjobs.slurm.controller import job_record
from tests.cluster.client import CommandError
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until


def running_job(slurm: SlurmCluster, *options: str) -> str:
    ignore = "trap '' TERM; sleep 600"
    where = ("-p", "preempt", "-w", "n1", "--output=/dev/null")
    job_id = slurm.submit(*where, *options, "--wrap", ignore)
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


def test_slurm_says_whether_a_time_limit_was_reached_and_the_times_on_record_do_not(
    slurm: SlurmCluster, site: Callable[[str, str], None], study: Path
) -> None:
    job_id = running_job(slurm)
    slurm.run("scancel", job_id)
    slurm.wait_state(job_id, {"COMPLETING", "CANCELLED"})
    # As of one that was allowed to run over its limit (OverTimeLimit).
    site("scontrol", '$real "$@" | sed "s/RunTime=[^ ]*/RunTime=2-00:00:00/"')
    assert notice(study, job_id).kind == "cancelled"
    # As at the end of its reservation, or of its account's hours: long before its own limit.
    site("scontrol", '$real "$@" | sed s/Reason=None/Reason=TimeLimit/')
    assert notice(study, job_id).kind == "time limit"


@pytest.mark.long
def test_a_job_whose_reservation_ends_has_reached_a_time_limit(
    slurm: SlurmCluster, study: Path
) -> None:
    name = "reservationname=course"
    asked = ("starttime=now", "duration=60", "users=root", "nodes=n1")
    slurm.run("scontrol", "create", "reservation", name, *asked)
    try:
        job_id = running_job(slurm, "--reservation=course", "--time=30")
        slurm.run("scontrol", "update", name, "endtime=now+1")
        slurm.wait_state(job_id, {"COMPLETING", "TIMEOUT"})
        assert notice(study, job_id).kind == "time limit"
    finally:
        slurm.cancel_all()
        with contextlib.suppress(CommandError):  # Slurm has deleted it, as it is over
            slurm.run("scontrol", "delete", name)
