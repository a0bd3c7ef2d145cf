"""Whether the attempt that is named as a run's holder still lives: Slurm's word decides."""

import os

from flowjobs.jobs.origin import identity_of
from flowjobs.runs.lock import Judge, Verdict, system_lock_decides
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo, same_host
from flowjobs.slurm.client import is_here
from flowjobs.slurm.jobs import Gone, Known, ask_one
from flowjobs.slurm.options import CONTINUES


def judge_for(run: Run, me: JobInfo) -> Judge:
    """The judge that an attempt which runs as `me` brings to the lock of `run`."""

    def judge(holder: JobInfo, lock_is_free: bool | None) -> Verdict:
        if holder.cluster != "slurm":
            return system_lock_decides(holder, lock_is_free)
        if me.cluster == "slurm" and holder.job_id == me.job_id:
            if me.restart_count > holder.restart_count:
                # Slurm has started the job again, so its earlier start is over, even if a process
                # of it still runs on a node that Slurm has lost.
                return "gone"
            return system_lock_decides(holder, lock_is_free)
        if lock_is_free and (same_host(holder.host, me.host) or not is_here()):
            # On one machine the system's lock is right; without Slurm nobody knows more.
            return "gone"
        verdict = job_verdict(run, holder)
        if verdict == "alive" and os.environ.get(CONTINUES) == holder.job_id:
            return "leaving"  # it has submitted this job as its last act
        return verdict

    return judge


def job_verdict(run: Run, holder: JobInfo) -> Verdict:
    """What Slurm says of the holder's job. Not of its process: a job may outlive that."""
    match ask_one(identity_of(run, holder.job_id, holder.log)):
        case Gone():
            return "gone"
        case Known(newest) if newest.state == "COMPLETING":
            return "leaving"  # also where Slurm counts its next start already
        case Known() as known if known.over or known.restarted_since(holder.restart_count):
            return "gone"
        case Known(newest) if newest.state in ("RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING"):
            return "alive"
        case Known():
            return "leaving"
    return "unknown"
