"""Whether the attempt that is named as a run's holder still lives: Slurm's word decides."""

import os

from flowjobs.errors import SubmissionError
from flowjobs.jobs import slurm
from flowjobs.runs.lock import Judge, Verdict, system_lock_decides
from flowjobs.runs.status import JobInfo, same_host


def judge_for(me: JobInfo) -> Judge:
    """The judge that an attempt which runs as `me` brings to a run's lock."""

    def judge(holder: JobInfo, lock_is_free: bool | None) -> Verdict:
        if holder.cluster != "slurm":
            return system_lock_decides(holder, lock_is_free)
        if me.cluster == "slurm" and holder.job_id == me.job_id:
            if me.restart > holder.restart:
                # Slurm has started the job again, so its earlier life is over, even if a process
                # of it still runs on a node that Slurm has lost.
                return "gone"
            return system_lock_decides(holder, lock_is_free)
        if lock_is_free and (same_host(holder.host, me.host) or not slurm.is_here()):
            # On one machine the system's lock is right; without Slurm nobody knows more.
            return "gone"
        verdict = job_verdict(holder)
        if verdict == "alive" and os.environ.get(slurm.CONTINUES) == holder.job_id:
            return "leaving"  # it has submitted this job as its last act
        return verdict

    return judge


def job_verdict(holder: JobInfo) -> Verdict:
    """What Slurm says of the holder's job. Not of its process: a job may outlive that."""
    try:
        record = slurm.job_record(holder.job_id)
    except SubmissionError:
        return "unknown"
    if record is None or record.restarts > holder.restart:
        return "gone"
    match record.state:
        case "RUNNING" | "SUSPENDED" | "STOPPED" | "CONFIGURING":
            return "alive"
        case "COMPLETING" | "SIGNALING" | "STAGE_OUT":
            return "leaving"
    return "gone"
