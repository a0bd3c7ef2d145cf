"""Why a job was told to leave, and how long it may stay: Slurm's word, not a guess."""

import signal
from dataclasses import dataclass
from typing import Literal

from flowjobs.errors import FlowjobsError
from flowjobs.runs.status import CANCELLED, JobInfo
from flowjobs.runs.submittable import Submittable
from flowjobs.slurm.cluster import kill_wait_s
from flowjobs.slurm.controller import job_record

Kind = Literal["node failure", "preempted", "time limit", "requeued", "cancelled", "told to leave"]


@dataclass(frozen=True)
class Notice:
    """What a signal meant.

    Attributes:
        kind: In a word or two.
        reason: As a sentence for the log and the status.
        seconds_left: Until the process is killed; None: nobody will.
    """

    kind: Kind
    reason: str
    seconds_left: float | None = None


def notice_of(run: Submittable, job: JobInfo, number: signal.Signals | None) -> Notice:
    """What `number`, sent to a job of `run`, meant.

    Raises:
        SubmissionError: Slurm does not answer.
    """
    name = number.name if number else "no signal"
    if number is signal.SIGINT:
        return Notice("told to leave", "interrupted by Ctrl-C")
    if run.cancel_requested():  # known without Slurm, which may be away
        return Notice("cancelled", CANCELLED.reason, _seconds_to_live(run, job))
    if job.cluster == "slurm":
        return _slurm_notice(run, job, name)
    if job.cluster == "local" and number is signal.SIGUSR2:
        return Notice("time limit", f"time limit ({name})", _seconds_to_live(run, job))
    return Notice("told to leave", f"told to leave ({name})", _seconds_to_live(run, job))


def _seconds_to_live(run: Submittable, job: JobInfo) -> float | None:
    """Until a job that was just told to leave is killed, at the soonest; None: nobody will."""
    match job.cluster:
        case "slurm":
            return kill_wait_s()
        case "local":
            return float(run.asked().signal_before_end_s)
    return None


def _slurm_notice(run: Submittable, job: JobInfo, signal_name: str) -> Notice:
    record = job_record(job.job_id)
    wait_s = kill_wait_s()
    if record is None:
        return Notice("told to leave", f"told to leave ({signal_name})", wait_s)
    # At the end of what it grants, Slurm says TERM and waits KillWait; where it does not say how
    # much it grants, that alone is sure.
    left = record.seconds_left
    seconds = max(0.0, left or 0.0) + wait_s
    ends_soon = left is not None and left < run.asked().signal_delay_s + 60
    if record.restarts > job.restart_count:
        # The record is that of its next start already.
        return Notice("requeued", f"requeued by Slurm ({signal_name})", wait_s)
    if record.preempted:
        return Notice("preempted", f"preempted ({signal_name})", seconds)
    if record.over_limit or (record.state == "RUNNING" and ends_soon):
        return Notice("time limit", f"time limit ({signal_name})", seconds)
    if record.state == "RUNNING":
        # TERM may be the first that is seen of a scancel; USR2 was sent by hand.
        left = None if signal_name == "SIGUSR2" else wait_s
        return Notice("told to leave", f"told to leave ({signal_name})", left)
    if record.lost_a_node:
        return Notice("node failure", f"a node was lost ({signal_name})", wait_s)
    if record.cancelled:
        return Notice("cancelled", f"cancelled by scancel ({signal_name})", wait_s)
    return Notice("told to leave", f"told to leave ({signal_name})", wait_s)


def seconds_left(run: Submittable, job: JobInfo, number: signal.Signals) -> float | None:
    """How long a job of `run` may live after a signal; None: as long as it wants."""
    try:
        return notice_of(run, job, number).seconds_left
    except (FlowjobsError, OSError):
        # A controller that is away kills nobody: it waits, and is asked again when leaving.
        return None
