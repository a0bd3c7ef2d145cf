"""Restart an interrupted run: requeue its Slurm job, or submit a new one."""

import logging
import time
from collections.abc import Callable

from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from flowjobs.errors import FlowjobsError, SubmissionError
from flowjobs.jobs import plain_sbatch
from flowjobs.jobs.origin import origin_of
from flowjobs.jobs.submit import submit
from flowjobs.runs.files import AWAY_AT_MOST_S, warn_once
from flowjobs.runs.status import EXIT_PREEMPTED, JobInfo
from flowjobs.runs.submittable import Submittable
from flowjobs.slurm.client import is_here
from flowjobs.slurm.controller import JobRecord, job_record, requeue
from flowjobs.slurm.requested import NO_NODE
from flowjobs.slurm.submission import TAKEN_WITHIN_S, UNANSWERED

logger = logging.getLogger(__name__)

Task = Callable[[], None]

# submitit's local executor starts a job at most six times.
LOCAL_STARTS = 6
# A controller that is away for longer than this is not waited for.
CONTROLLER_WAIT_S = 900.0
ASK_EVERY_S = 2.0


def restart(
    run: Submittable,
    job: JobInfo,
    task: Task,
    exclude: str | None = None,
    *,
    told_to_leave: bool = False,
) -> int:
    """Have a run whose job has saved its state and leaves started again, where that can be done.

    Never if its user has cancelled it: `scontrol requeue` would bring it back. Where it cannot be
    started, that is logged, and not raised: its callers have still to tell W&B how it ended, and
    `reconcile` tries again, or the user.

    Args:
        run: The run; nobody holds it any more.
        job: The job that leaves: this process's own.
        task: What a new job of the run would do.
        exclude: A node that should not be used again.
        told_to_leave: Whether a signal without a known cause ends it. A local job has that from its
            user, by `kill`, and stays ended.

    Returns:
        The exit code with which this process should end.
    """
    try:
        if cancel_requested_with_retries(run):
            return EXIT_PREEMPTED
        match job.cluster:
            case "slurm":
                _restart_in_slurm(run, job, task, exclude)
            case "local" if not told_to_leave:
                if job.restart_count + 1 < LOCAL_STARTS:
                    logger.info("%s starts again at once", run.name)
                    return LOCAL_REQUEUE_RETURN_CODE
                logger.info("%s continues as local job %s", run.name, resubmit(run, job, task))
    except (FlowjobsError, OSError) as error:
        logger.error("%s is not started again: %s", run.name, error)
    return EXIT_PREEMPTED


def _restart_in_slurm(run: Submittable, job: JobInfo, task: Task, exclude: str | None) -> None:
    record = _record_when_it_answers(job.job_id)
    # A job of salloc or srun has no script that Slurm could run again.
    if record is None or record.fields.get("BatchFlag") in (None, "0"):
        logger.info("%s is no batch job: run the same command again to resume", job.job_id)
        return
    # Its count grows while this start still has its grace; a second requeue would fail.
    if record.restarts > job.restart_count:
        logger.info("Slurm starts job %s again by itself", job.job_id)
        return
    # Between the answer above and the request below a `scancel` would be undone; the signal that
    # it sends is found in the log by the next start (jobs/exit_cause.py).
    if record.cancelled or cancel_requested_with_retries(run):
        logger.info("job %s was cancelled; the run stays as it is", job.job_id)
        return
    try:
        requeue(job.job_id, exclude)
        logger.info("job %s is requeued and will resume from here", job.job_id)
    except SubmissionError as refused:
        if _is_requeued_all_the_same(job, str(refused)):
            return
        logger.info("job %s cannot be requeued (%s)", job.job_id, refused)
        logger.info("%s continues as job %s", run.name, resubmit(run, job, task, exclude))


def _is_requeued_all_the_same(job: JobInfo, said: str) -> bool:
    """Whether a job that Slurm would not requeue, by what it said, is requeued or gone: the answer
    may have been lost, and not the request. A busy controller may take that later."""
    deadline = time.monotonic() + (TAKEN_WITHIN_S if UNANSWERED.search(said) else 0.0)
    while True:
        record = _record_when_it_answers(job.job_id)
        if record is None:
            logger.info("job %s is gone (%s); submit it again", job.job_id, said)
            return True
        if record.restarts > job.restart_count:
            logger.info("job %s is requeued, although Slurm said: %s", job.job_id, said)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(ASK_EVERY_S)


def cancel_requested_with_retries(run: Submittable) -> bool:
    """Whether a run is cancelled; a file server that is away is waited for."""
    deadline = time.monotonic() + AWAY_AT_MOST_S
    while True:
        try:
            return run.cancel_requested()
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            warn_once(f"{error}; waiting for it, up to {AWAY_AT_MOST_S:.0f} s")
            time.sleep(ASK_EVERY_S)


def _record_when_it_answers(job_id: str) -> JobRecord | None:
    deadline = time.monotonic() + CONTROLLER_WAIT_S
    said = False
    while True:
        try:
            return job_record(job_id)
        except SubmissionError as error:
            if time.monotonic() > deadline or not is_here():
                logger.error("%s; the run is not started again: submit it once more", error)
                raise
            if not said:
                logger.warning("%s; waiting for it", error)
                said = True
            time.sleep(ASK_EVERY_S)


def resubmit(run: Submittable, job: JobInfo, task: Task, exclude: str | None = None) -> str:
    """Submit a run again, the way its job was submitted, to continue from that one.

    Args:
        run: The run.
        job: The job that ends.
        task: What the new job does.
        exclude: A node to leave out, if another one can start the job.

    Returns:
        The new job's id.

    Raises:
        SubmissionError: It cannot be submitted.
    """
    if job.cluster == "local":
        return submit(run, "local", task, continues=job.job_id).job_id
    try:
        return _resubmit_to_slurm(run, job, task, exclude)
    except SubmissionError as refused:
        if exclude is None or not NO_NODE.search(str(refused)):
            raise
        logger.info("%s may start on %s again: no other node has what it asks", run.name, exclude)
        return _resubmit_to_slurm(run, job, task, None)


def _resubmit_to_slurm(run: Submittable, job: JobInfo, task: Task, exclude: str | None) -> str:
    entries = [entry for entry in run.submissions() if entry.job_id == job.job_id]
    # Submitted by sbatch, with a script of its user's: by that script again.
    if entries and (entries[-1].again or entries[-1].script_arguments is not None):
        return plain_sbatch.resubmit(run, entries[-1], exclude)
    origin = origin_of(run, job.job_id)
    return submit(run, "slurm", task, continues=job.job_id, exclude=exclude, origin=origin).job_id
