"""How a run goes on after its job: started again by Slurm, or as a new job, or not at all."""

import logging
import time

from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from flowjobs.errors import SubmissionError
from flowjobs.jobs import slurm
from flowjobs.jobs.submit import resubmit
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_PREEMPTED, JobInfo

logger = logging.getLogger(__name__)

# submitit's local executor starts a job at most six times.
LOCAL_STARTS = 6
# A controller that is away for longer than this is not waited for.
CONTROLLER_WAIT_S = 900.0
ASK_EVERY_S = 2.0


def go_on(run: Run, job: JobInfo, kind: str, exclude: str | None = None) -> int:
    """Have a run whose job has saved its state and leaves started again, where that can be done.

    Never if its user has cancelled it: `scontrol requeue` would bring it back.

    Args:
        run: The run; nobody holds it any more.
        job: The job that leaves: this process's own.
        kind: Why it leaves, in a word or two.
        exclude: A node that should not be used again.

    Returns:
        The exit code with which this process should end.
    """
    if run.cancel_requested():
        return EXIT_PREEMPTED
    match job.cluster:
        case "slurm":
            _go_on_in_slurm(run, job, exclude)
        case "local" if kind != "told to leave":  # that was the user, by `kill`
            if job.restart + 1 < LOCAL_STARTS:
                logger.info("%s starts again at once", run.name)
                return LOCAL_REQUEUE_RETURN_CODE
            logger.info("%s goes on as local job %s", run.name, resubmit(run, job))
    return EXIT_PREEMPTED


def _go_on_in_slurm(run: Run, job: JobInfo, exclude: str | None) -> None:
    record = _record_when_it_answers(job.job_id)
    if record is None or record.fields.get("BatchFlag") in (None, "0"):
        logger.info("%s is no batch job: run the same command again to go on", job.job_id)
        return
    if record.restarts > job.restart:
        logger.info("Slurm starts job %s again by itself", job.job_id)
        return
    # Between the answer above and the request below a `scancel` would be undone; the signal that
    # it sends is found in the log by the next life (jobs/deaths.py).
    if record.cancelled or run.cancel_requested():
        logger.info("job %s was cancelled; the run stays as it is", job.job_id)
        return
    try:
        slurm.requeue(job.job_id, exclude)
        logger.info("job %s is requeued; it goes on from here", job.job_id)
    except SubmissionError as refused:
        logger.info("job %s cannot be requeued (%s)", job.job_id, refused)
        logger.info("%s goes on as job %s", run.name, resubmit(run, job, exclude))


def _record_when_it_answers(job_id: str) -> slurm.JobRecord | None:
    deadline = time.monotonic() + CONTROLLER_WAIT_S
    said = False
    while True:
        try:
            return slurm.job_record(job_id)
        except SubmissionError as error:
            if time.monotonic() > deadline or not slurm.is_here():
                logger.error("%s; the run is not started again: submit it once more", error)
                raise
            if not said:
                logger.warning("%s; waiting for it", error)
                said = True
            time.sleep(ASK_EVERY_S)
