"""Closes what died without a word, and has it started again where it should be.

Asked by the last lines of a batch script, by `flowjobs reconcile` and in passing by `status`. The
next attempt of a run does the same at its own start, under the run's lock (runs/attempt.py).
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from filelock import FileLock, Timeout

from flowjobs.errors import FlowjobsError, SubmissionError
from flowjobs.jobs import deaths, slurm
from flowjobs.jobs.going_on import go_on
from flowjobs.jobs.holders import job_verdict
from flowjobs.jobs.submit import resubmit
from flowjobs.runs.lock import lock_holder
from flowjobs.runs.restarts import fruitless_attempts, may_retry
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    EXIT_CANCELLED,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    AttemptRecord,
    JobInfo,
    Outcome,
    RunStatus,
    now,
)
from flowjobs.tracking.closing import close_session, pending_outcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Closed:
    """A run whose newest attempt was found dead, and how that ended."""

    run: Run
    outcome: Outcome


def reconcile(runs: Iterable[Run]) -> list[Closed]:
    """Close the runs whose job is gone, asking Slurm once for all of them.

    Doing it twice, or in two places at once, does no harm.

    Raises:
        SubmissionError: Slurm does not answer; nothing was changed.
    """
    runs = list(runs)
    suspects = [run for run in runs if _awaits_an_end(run)]
    in_slurm = any(_newest_job(run)[1] == "slurm" for run in suspects)
    queue = slurm.queue() if in_slurm else {}
    closed = []
    for run in suspects:
        try:
            with FileLock(run.folder / ".reconcile-lock", timeout=0):
                outcome = _close(run, queue)
        except Timeout:
            continue  # somebody else is at it
        except FlowjobsError as error:
            logger.error("%s: %s", run.name, error)
            continue
        if outcome:
            closed.append(Closed(run, outcome))
    for run in runs:
        # Told in vain before: the server was away, or the process had no time left.
        if lock_holder(run.folder) is None and (outcome := pending_outcome(run)):
            close_session(run, outcome)
    return closed


def close_ended_job(run: Run, job: JobInfo, exit_code: int) -> Outcome | None:
    """Close a run from the last lines of its batch script, and retry it if it may be.

    Args:
        run: The run.
        job: The job that ends.
        exit_code: What its srun returned, not 0.

    Returns:
        How the attempt ended; None if it has said so itself.
    """
    with FileLock(run.folder / ".reconcile-lock", timeout=30):
        status = run.status() or RunStatus()
        attempt = status.open_attempt
        lives = [(known.job.job_id, known.job.restart) for known in status.attempts]
        if attempt and (attempt.job.job_id, attempt.job.restart) == (job.job_id, job.restart):
            outcome = deaths.cause_of(run, attempt, exit_code)
        elif attempt or (job.job_id, job.restart) in lives or exit_code == EXIT_CANCELLED:
            return None  # it has said so itself, or another job holds the run
        else:
            outcome = deaths.cause_of_no_start(job, exit_code)
            status.attempts.append(AttemptRecord(len(status.attempts) + 1, job, started=now()))
        again = _should_go_on(run, status, job, outcome)
        _write(run, status, _as_it_goes_on(outcome, again))
        if again:
            go_on(run, job, _node_to_avoid(job, outcome))
        return outcome


def _awaits_an_end(run: Run) -> bool:
    status = run.status() or RunStatus()
    if status.open_attempt is not None:
        return True
    known = {attempt.job.job_id for attempt in status.attempts}
    return any(entry["job_id"] not in known for entry in run.submissions()[-1:])


def _newest_job(run: Run) -> tuple[str, str]:
    """Id and cluster of the newest job."""
    status = run.status()
    if status and status.open_attempt:
        job = status.open_attempt.job
        return job.job_id, job.cluster
    entry = run.submissions()[-1]
    return entry["job_id"], entry["cluster"]


def _close(run: Run, queue: Collection[str]) -> Outcome | None:
    status = run.status() or RunStatus()
    attempt = status.open_attempt
    job_id, cluster = _newest_job(run)
    waits = job_id in queue
    if attempt is None:
        if waits or cluster != "slurm":
            return None
        log = run.submissions()[-1]["log"]
        job = JobInfo("slurm", job_id, log, host="its node", pid=0)
        outcome = deaths.cause_of_no_start(job)
        status.attempts.append(AttemptRecord(len(status.attempts) + 1, job, started=now()))
    else:
        if not _is_gone(run, attempt, waits):
            return None
        job = attempt.job
        outcome = deaths.cause_of(run, attempt)
    again = not waits and _should_go_on(run, status, job, outcome)
    outcome = _as_it_goes_on(outcome, again or waits)
    _write(run, status, outcome)
    if again:
        try:
            new = resubmit(run, job, _node_to_avoid(job, outcome))
            logger.info("%s goes on as job %s", run.name, new)
        except SubmissionError as error:
            _write(run, status, replace(outcome, state="failed", reason=f"{error}"))
            raise
    return outcome


def _is_gone(run: Run, attempt: AttemptRecord, in_queue: bool) -> bool:
    if attempt.job.cluster == "slurm":
        return not in_queue or job_verdict(attempt.job) == "gone"
    return lock_holder(run.folder) is None


def _should_go_on(run: Run, status: RunStatus, job: JobInfo, outcome: Outcome) -> bool:
    """Whether the run is to be started again, if the scheduler does not do it."""
    if outcome.state == "cancelled" or run.cancel_requested() or job.cluster != "slurm":
        return False
    restarts = run.config().restarts
    if outcome.kind in ("preempted", "time limit"):
        return fruitless_attempts(status.attempts) + 1 < restarts.give_up_after
    if not status.attempts:
        return False
    *before, last = status.attempts
    return may_retry(before, outcome.kind, last.last_step, restarts.retries)


def _as_it_goes_on(outcome: Outcome, again: bool) -> Outcome:
    """A run that nobody starts again has failed; one that is started again has not."""
    if outcome.state == "failed" and again:
        reason = f"{outcome.reason}; starts again"
        return replace(outcome, state="preempted", exit_code=EXIT_PREEMPTED, reason=reason)
    if outcome.state == "preempted" and not again:
        return replace(outcome, state="failed", exit_code=EXIT_FAILED)
    return outcome


def _node_to_avoid(job: JobInfo, outcome: Outcome) -> str | None:
    return None if outcome.kind in ("preempted", "time limit") else job.host


def _write(run: Run, status: RunStatus, outcome: Outcome) -> None:
    status.close(outcome)
    status.write(run.status_file)
    # W&B last: what is on disk decides, and a server may not answer.
    close_session(run, outcome)
