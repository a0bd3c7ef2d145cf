"""Ends a run's jobs because its user wants no more of it."""

import contextlib
import os
import signal
import socket

from flowjobs import slurm
from flowjobs.errors import SubmissionError
from flowjobs.jobs.origin import identity_of
from flowjobs.runs.lock import lock_holder
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_CANCELLED, Outcome, RunStatus, same_host
from flowjobs.slurm import Known, Unknown, ask
from flowjobs.tracking.closing import close_session


def cancel(run: Run) -> list[str]:
    """Cancel a run and every job of it. Returns what was done, a line each.

    Raises:
        SubmissionError: Slurm does not answer. The run is noted as cancelled all the same: a job
            of it that starts again sees that and ends.
    """
    if run.finished():
        return [f"{run.name} is finished; there is nothing to cancel"]
    run.request_cancel()  # first: a job that is just being requeued must see it
    ended = _end_jobs(run)
    status = run.status() or RunStatus()
    # A process that trains says itself how it ends; of a job that only waits, nobody else would.
    nobody_trains = status.open_attempt is None and lock_holder(run.folder) is None
    if nobody_trains and status.state != "cancelled":
        reason = "cancelled by flowjobs cancel"
        outcome = Outcome("cancelled", EXIT_CANCELLED, reason, kind="cancelled")
        status.close(outcome)
        status.write(run.status_file)
        close_session(run, outcome)
    if ended:
        return [f"{run.name}: cancelled {', '.join(ended)}; submit it again to resume"]
    return [f"{run.name}: no job of it waits or runs; nothing will start it again"]


def _end_jobs(run: Run) -> list[str]:
    ended = _end_slurm_jobs(run)
    status = run.status()
    attempt = status.open_attempt if status else None
    if attempt and attempt.job.cluster in ("local", "none") and lock_holder(run.folder):
        job = attempt.job
        if not same_host(job.host, socket.gethostname()):
            raise SubmissionError(
                f"{run.name} runs as process {job.pid} on {job.host}: cancel it from there; "
                "it is noted as cancelled and will not be started again"
            )
        with contextlib.suppress(ProcessLookupError):
            # The process that trains: submitit's controller starts nothing more when that ends.
            os.kill(job.pid, signal.SIGTERM)
            ended.append(f"process {job.pid}")
    return ended


def _end_slurm_jobs(run: Run) -> list[str]:
    entries = [entry for entry in run.submissions() if entry["cluster"] == "slurm"]
    ended = []
    unknown = ""
    for job, answer in ask([identity_of(run, entry["job_id"]) for entry in entries]).items():
        match answer:
            case Known() if not answer.over and job.is_mine():
                slurm.cancel(job.job_id)
                ended.append(job.words)
            case Known() if not answer.over:
                unknown = f"{job.words} is theirs to cancel (scancel {job.job_id})"
            case Unknown(why) if job.job_id == entries[-1]["job_id"]:
                # Of older ones it does not matter: the newest was submitted when they were gone.
                unknown = f"{job.words} was not cancelled: {why}"
    if unknown:
        raise SubmissionError(
            f"{run.name}: {unknown}; the run is noted as cancelled: a job of it that starts sees "
            "that, and ends"
        )
    return ended
