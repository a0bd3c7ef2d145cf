"""Why a job is pending, in plain words."""

import re
import time
from dataclasses import dataclass

from flowjobs.slurm.controller import JobRow

# By the beginning of Slurm's word (a pattern), the longer before the shorter; `squeue -o %r` has
# about 200.
# Some are sentences, which scontrol prints with underscores. First what never starts as it is.
STUCK = (
    ("JobHeldUser", "held by its user: `scontrol release {job}` lets it start"),
    ("JobHeldAdmin", "held by an administrator, who must release it"),
    ("JobHoldMaxRequeue", "held after too many restarts: `scontrol release {job}`"),
    (
        "launch_failed_requeued_held",
        "held, for a node could not start it: `scontrol release {job}`",
    ),
    ("job_requeued_in_held_state", "held as it was requeued: `scontrol release {job}`"),
    (
        "user_env_retrieval_failed",
        "held, for its environment was not found: `scontrol release {job}`",
    ),
    (
        "ReservationDeleted",
        "held, for its reservation was deleted: submit it without --sbatch reservation, or "
        "`scontrol release {job}`",
    ),
    ("DependencyNeverSatisfied", "for jobs that can never end as it was told to wait: cancel it"),
    (
        "PartitionTimeLimit",
        "and cannot start: its time limit is above the partition's (--timeout-min)",
    ),
    ("PartitionNodeLimit", "and cannot start: the partition allows fewer nodes (--nodes)"),
    ("PartitionConfig", "and cannot start: the partition does not allow what it asks for"),
    ("QOSMaxWall", "and cannot start: its time limit is above that of its QOS (--timeout-min)"),
    (
        "AssocMaxWall",
        "and cannot start: its time limit is above that of its account (--timeout-min)",
    ),
    # Other limits, on all jobs of an account or a user, leave room when these end.
    (r"QOSMax\w+Per(Job|Node)", "and cannot start: it asks for more than its QOS allows one job"),
    (
        r"AssocMax\w+Per(Job|Node)",
        "and cannot start: it asks for more than its account allows one job",
    ),
    ("QOSMin", "and cannot start: it asks for less than its QOS demands of a job"),
    ("DeadLine", "and cannot start: it would not end before its deadline"),
    ("QOSNotAllowed", "and cannot start: its QOS is not allowed in this partition (--qos)"),
    ("InvalidAccount", "and cannot start: its account is not valid (--account)"),
    ("InvalidQOS", "and cannot start: its QOS is not valid (--qos)"),
    (
        "AccountNotAllowed",
        "and cannot start: its account is not allowed in this partition (--account)",
    ),
    (
        "MaxMemPerLimit",
        "and cannot start: it asks for more memory than one job may have (--mem-gb)",
    ),
    ("BadConstraints", "and cannot start: no node has what it asks for"),
)
WORDS = (
    *STUCK,
    ("BeginTime", "for its start time{start}"),
    ("Resources", "for nodes or GPUs to become free{start}"),
    ("Priority", "behind jobs of higher priority{start}"),
    ("Dependency", "for other jobs to end{dependency}"),
    ("ReqNodeNotAvail", "for nodes that are down, drained or reserved{start}"),
    ("Nodes_required", "for nodes that are down, drained or reserved{start}"),
    ("NodeDown", "for a node that is down"),
    ("PartitionDown", "for its partition, which is down"),
    ("PartitionInactive", "for its partition, which is inactive"),
    ("AssociationJobLimit", "for your account's limit on jobs"),
    ("Assoc", "for a limit of your account"),
    ("QOS", "for a limit of its QOS"),
    ("MaxGRES", "for a limit on GPUs"),
    ("MaxCpu", "for a limit on CPUs"),
    ("MaxMemory", "for a limit on memory"),
    (r"Max\w+PerAccount", "for a limit of your account"),
    ("Reservation", "for its reservation to begin"),
    ("Licenses", "for licenses to become free"),
    ("JobArrayTaskLimit", "for other tasks of the array"),
    ("Cleaning", "for its last start to be cleaned up on the node"),
    ("Prolog", "for its nodes to be made ready"),
    ("FrontEndDown", "for the front end, which is down"),
    ("SystemFailure", "after a failure of Slurm itself: an administrator must look"),
    ("None", "for Slurm to schedule it"),
)


@dataclass(frozen=True)
class Waiting:
    """That a job is pending.

    Attributes:
        why: The reason, to be read after "waits".
        stuck: Whether it never starts as it is.
    """

    why: str
    stuck: bool = False


def why_it_waits(row: JobRow) -> Waiting:
    """Why a job waits, with Slurm's own word."""
    if row.state in ("SUSPENDED", "STOPPED"):
        why = f"{row.state.lower()}, for another job or by an administrator ({row.state})"
        return Waiting(why)
    if row.state == "CONFIGURING":  # of a cloud they boot first, which takes minutes
        return Waiting("for its nodes to be made ready (CONFIGURING)")
    reason = row.reason.strip("()")
    for number, (word, words) in enumerate(WORDS):
        if re.match(word, reason.replace(" ", "_")):
            start = f", about {_clock(row.starts)}" if row.starts else ""
            dependency = f" ({row.dependency})" if row.dependency else ""
            text = words.format(job=row.job_id, start=start, dependency=dependency)
            why = text if word == "None" else f"{text} ({reason})"
            return Waiting(why, stuck=number < len(STUCK))
    return Waiting(f"for Slurm's reason {reason or 'unknown'}")


def why_it_is_silent(row: JobRow) -> Waiting:
    """That a job runs whose process has not reported yet."""
    since = f" since {_clock(row.starts)}" if row.starts else ""
    return Waiting(f"for its process to report: job {row.job_id} runs on {row.nodes}{since}")


def _clock(seconds: float) -> str:
    # Slurm's own clock, as in its other answers.
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
