"""A run's newest job, as far as the disk tells: nobody asks Slurm here."""

import socket
from collections.abc import Sequence

from flowjobs.runs.process import process_lives
from flowjobs.runs.run import Run
from flowjobs.runs.status import same_host
from flowjobs.runs.submittable import Submission, attempts_of


def ended_for_good(run: Run, job: Submission) -> bool:
    """Whether it is on record how the job's attempt ended, and that nobody was to restart it."""
    ended = attempts_of(job, run.status().attempts)
    if not ended:
        return False
    # A local job that was told to leave was so by its user: see `restart`.
    left = ended[-1].job.cluster == "local" and ended[-1].kind == "told to leave"
    return left or ended[-1].state in ("finished", "failed", "cancelled")


def local_job(run: Run, entries: Sequence[Submission]) -> str | None:
    """The run's newest job, as text, if it is one of this machine that starts, or starts again."""
    if not entries or entries[-1].cluster != "local":
        return None
    entry = entries[-1]
    if not (entry.host and entry.process and same_host(entry.host, socket.gethostname())):
        return None  # the lock alone tells
    if ended_for_good(run, entry) or not process_lives(int(entry.job_id), entry.process):
        return None
    return f"local job {entry.job_id} on {entry.host}"


def job_to_come(run: Run) -> str | None:
    """The run's newest job, as text, if by what is on disk it may still start, or start again.

    Slurm may know that it is gone; to cancel the run says so here.
    """
    entries = run.submissions()
    if not entries or run.cancel_requested():
        return None
    if entries[-1].cluster != "slurm":
        return local_job(run, entries)
    return None if ended_for_good(run, entries[-1]) else f"slurm job {entries[-1].job_id}"
