"""Closes what died without a word, and has it started again where it should be.

Asked by the last lines of a batch script, by `flowjobs reconcile` and in passing by `status`. The
next attempt of a run does the same at its own start (runs/attempt.py). First it is found out,
which may take long; then it is written down, under the run's lock and only if no attempt has
started meanwhile; then the run is started again; and W&B, which may not answer, comes last.
"""

import logging
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from flowjobs.errors import FlowjobsError, RunBusyError
from flowjobs.jobs import deaths, slurm
from flowjobs.jobs.going_on import go_on
from flowjobs.jobs.holders import job_verdict
from flowjobs.jobs.origin import check_own
from flowjobs.jobs.submit import resubmit
from flowjobs.runs.lock import (
    RECONCILE,
    RunLock,
    Verdict,
    lock_holder,
    process_lives,
    system_lock_decides,
)
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
    same_host,
)
from flowjobs.tracking.closing import close_session, pending_outcome

logger = logging.getLogger(__name__)

Queue = Mapping[str, tuple[str, str]]
# How many attempts there are, whether the newest one has ended, and why.
Seen = tuple[int, bool, str]

# Accounting is some seconds behind, and not there at all on some clusters: after this long the
# cause is told as far as the log shows it.
UNKNOWN_AFTER = timedelta(minutes=10)


@dataclass(frozen=True)
class Closed:
    """A run whose newest attempt was found dead, and how that ended."""

    run: Run
    outcome: Outcome


@dataclass(frozen=True)
class Dead:
    """What was found out of a run, before anything is written.

    Attributes:
        job: The job that is gone.
        outcome: How it ended.
        seen: What the status said of attempts when it was looked at; see `_seen`.
        waits: Whether Slurm starts the job again by itself.
        started: Whether an attempt of the job had begun.
    """

    job: JobInfo
    outcome: Outcome
    seen: Seen
    waits: bool = False
    started: bool = True


def reconcile(runs: Iterable[Run], *, tell_wandb: bool = True) -> list[Closed]:
    """Close the runs whose job is gone; one question to Slurm answers it for those that are not.

    Args:
        runs: Those to look at.
        tell_wandb: Wait until W&B knows, and also tell it what could not be told before. It may
            take a minute a run.

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
            dead = _find_dead(run, queue)
            outcome = _close(run, dead) if dead else None
            if dead and outcome and outcome.state == "preempted" and not dead.waits:
                new = resubmit(run, dead.job, _node_to_avoid(dead))
                logger.info("%s goes on as job %s", run.name, new)
        except (FlowjobsError, OSError) as error:
            logger.error("%s: %s", run.name, error)
            continue
        if outcome:
            closed.append(Closed(run, outcome))
    for found in closed:
        if lock_holder(found.run.folder) is None:  # else its next attempt tells
            close_session(found.run, found.outcome, wait=tell_wandb)
    for run in runs if tell_wandb else ():
        if lock_holder(run.folder) is None and (untold := pending_outcome(run)):
            close_session(run, untold)
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
    status = run.status() or RunStatus()
    attempt, seen = status.open_attempt, _seen(status)
    lives = [(known.job.job_id, known.job.restart) for known in status.attempts]
    life = (job.job_id, job.restart)
    if exit_code == EXIT_PREEMPTED and life not in lives:
        # It has not got the run, since another attempt may still have it: later, then.
        if job.restart < run.config().restarts.give_up_after:
            go_on(run, job, "waiting")
        return None
    if attempt and (attempt.job.job_id, attempt.job.restart) == life:
        dead = Dead(job, deaths.cause_of(run, attempt, exit_code), seen)
    elif attempt or life in lives or exit_code == EXIT_CANCELLED:
        return None  # it has said so itself, or another job holds the run
    else:
        dead = Dead(job, deaths.cause_of_no_start(job, exit_code), seen, started=False)
    outcome = _close(run, dead)
    if outcome and outcome.state == "preempted":
        go_on(run, job, outcome.kind, _node_to_avoid(dead))
    if outcome:
        close_session(run, outcome)
    return outcome


def _awaits_an_end(run: Run) -> bool:
    status = run.status() or RunStatus()
    entries = run.submissions()
    if status.open_attempt is not None:
        return True
    if not entries or run.finished():
        return False
    if any(attempt.job.job_id == entries[-1]["job_id"] for attempt in status.attempts):
        return status.state == "preempted" and entries[-1]["cluster"] == "slurm"
    # A job that came too late, and was refused or found nothing to do, says nothing of the run.
    ended = status.attempts[-1].ended if status.attempts else None
    return ended is None or entries[-1]["submitted"] > ended


def _newest_job(run: Run) -> tuple[str, str]:
    """Id and cluster of the newest job."""
    status = run.status()
    if status and status.open_attempt:
        job = status.open_attempt.job
        return job.job_id, job.cluster
    entry = run.submissions()[-1]
    return entry["job_id"], entry["cluster"]


def _find_dead(run: Run, queue: Queue) -> Dead | None:
    """What became of the run's newest job, if that is over. Writes nothing."""
    status = run.status() or RunStatus()
    attempt = status.open_attempt
    if attempt is None:
        return _find_gone_job(run, status, queue)
    if not _is_gone(run, attempt, queue):
        return None
    outcome = deaths.known_cause_of(run, attempt)
    if outcome is None:
        if datetime.now(UTC) - datetime.fromisoformat(status.updated) < UNKNOWN_AFTER:
            return None  # accounting will know soon
        outcome = deaths.cause_of(run, attempt)
    return Dead(attempt.job, outcome, _seen(status), waits=attempt.job.job_id in queue)


def _find_gone_job(run: Run, status: RunStatus, queue: Queue) -> Dead | None:
    """The run's newest job, if it ended while no attempt was there to say so."""
    entry = run.submissions()[-1]
    job_id, cluster = entry["job_id"], entry["cluster"]
    job = JobInfo(cluster, job_id, entry["log"], entry.get("host", "its node"), pid=0)
    started = job_id in {attempt.job.job_id for attempt in status.attempts}
    if cluster == "local":
        here = same_host(job.host, socket.gethostname())
        if not here or process_lives(int(job_id)) or lock_holder(run.folder):
            return None
    elif cluster != "slurm" or job_id in queue or job_verdict(job) != "gone":
        return None
    outcome = deaths.cause_of_no_start(job)
    if started and outcome.state != "cancelled":
        # It left in good order, but had no time, or no way, to be started again.
        reason = f"{status.reason}; then no job of it was left"
        outcome = Outcome("preempted", EXIT_PREEMPTED, reason, kind="preempted")
    return Dead(job, outcome, _seen(status), started=started)


def _is_gone(run: Run, attempt: AttemptRecord, queue: Queue) -> bool:
    job = attempt.job
    if job.cluster == "slurm":
        state, _ = queue.get(job.job_id, ("", ""))
        # A job that is not in this user's queue may be another user's.
        return state != "RUNNING" and job_verdict(job) == "gone"
    # The locks of processes on another machine are not always seen from here.
    return same_host(job.host, socket.gethostname()) and lock_holder(run.folder) is None


def _seen(status: RunStatus) -> Seen:
    return len(status.attempts), status.open_attempt is None, status.reason


def _close(run: Run, dead: Dead) -> Outcome | None:
    """Write down how a run's newest attempt ended.

    Returns:
        The outcome as it is on disk: "preempted" if the run is to be started again. None if an
        attempt has started since it was looked at, or somebody else has written it down.
    """

    def judge(holder: JobInfo, lock_is_free: bool | None) -> Verdict:
        same = (holder.job_id, holder.restart) == (dead.job.job_id, dead.job.restart)
        return "gone" if same else system_lock_decides(holder, lock_is_free)

    me = JobInfo(RECONCILE, str(os.getpid()), None, socket.gethostname(), os.getpid())
    try:
        with RunLock(run.folder, me, judge) as lock:
            status = run.status() or RunStatus()
            if _seen(status) != dead.seen or not lock.is_held():
                return None
            if not dead.started:
                record = AttemptRecord(len(status.attempts) + 1, dead.job, started=now())
                status.attempts.append(record)
            again = dead.waits or _should_go_on(run, status, dead)
            if again and not dead.waits:
                check_own(run, dead.job.job_id)
            outcome = _as_it_goes_on(dead.outcome, again)
            status.close(outcome)
            status.write(run.status_file)
    except RunBusyError:
        return None
    return outcome


def _should_go_on(run: Run, status: RunStatus, dead: Dead) -> bool:
    """Whether the run is to be started again, if the scheduler does not do it."""
    outcome = dead.outcome
    if outcome.state == "cancelled" or run.cancel_requested() or dead.job.cluster != "slurm":
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


def _node_to_avoid(dead: Dead) -> str | None:
    if dead.outcome.kind in ("preempted", "time limit"):
        return None
    return deaths.failed_node(dead.job)
