"""Record how dead attempts ended; restart those that may be retried.

Asked by the last lines of a batch script and by `flowjobs reconcile`. The next attempt of a run
does the same at its own start (runs/attempt.py). First it is found out (jobs/findings.py), which
may take long; then it is written down, under the run's lock and only if no attempt has started
meanwhile; then the run is started again; and W&B, which may not answer, comes last.
"""

import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from flowjobs.errors import FlowjobsError, RunBusyError
from flowjobs.jobs import exit_cause
from flowjobs.jobs.entry import task_of
from flowjobs.jobs.findings import Dead, Unclear, Waits, final_outcome, find, seen_of
from flowjobs.jobs.origin import check_own
from flowjobs.jobs.restart import restart, resubmit
from flowjobs.runs.lock import RECONCILE, RunLock, Verdict, lock_holder, system_lock_decides
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    EXIT_CANCELLED,
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
class Reconciled:
    """What came of a run whose newest job has, or may have, ended unnoticed.

    Attributes:
        run: The run.
        outcome: How its newest attempt ended, as it was noted; None if that is unknown.
        unclear: Why it is unknown.
    """

    run: Run
    outcome: Outcome | None = None
    unclear: str = ""


def reconcile(runs: Iterable[Run], *, tell_wandb: bool = True) -> list[Reconciled]:
    """Close the runs whose job is gone; one question to Slurm answers it for those that are not.

    Args:
        runs: Those to look at.
        tell_wandb: Wait until W&B knows, and also tell it what could not be told before. It may
            take a minute a run.

    Returns:
        Those that were closed, and those of which it is unknown: these stay as they are.
    """
    runs = list(runs)
    results = []
    for run, found in find(runs).items():
        if isinstance(found, Waits):
            continue
        if isinstance(found, Unclear):
            results.append(Reconciled(run, unclear=found.why))
            continue
        try:
            outcome = _close(run, found)
            if outcome and outcome.state == "preempted" and not found.waits:
                new = resubmit(run, found.job, task_of(run), _node_to_avoid(run, found))
                logger.info("%s continues as job %s", run.name, new)
        except (FlowjobsError, OSError) as error:
            logger.error("%s: %s", run.name, error)
            continue
        if outcome:
            results.append(Reconciled(run, outcome))
    for closed in results:
        if closed.outcome and lock_holder(closed.run.folder) is None:  # else its next attempt tells
            close_session(closed.run, closed.outcome, wait=tell_wandb)
    for run in runs if tell_wandb else ():
        if lock_holder(run.folder) is None and (untold := pending_outcome(run)):
            close_session(run, untold)
    return results


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
    attempt, seen = status.open_attempt, seen_of(status)
    lives = [(known.job.job_id, known.job.restart) for known in status.attempts]
    life = (job.job_id, job.restart)
    if exit_code == EXIT_PREEMPTED and life not in lives:
        # It has not got the run, since another attempt may still have it: later, then.
        if job.restart < run.config().restarts.give_up_after:
            restart(run, job, "waiting", task_of(run))
        return None
    if attempt and (attempt.job.job_id, attempt.job.restart) == life:
        dead = Dead(job, exit_cause.cause_of(run, attempt, exit_code), seen)
    elif attempt or life in lives or exit_code == EXIT_CANCELLED:
        # It has said so itself, or another job holds the run.
        newest = lives[-1:] == [life] and run.submissions()[-1]["job_id"] == job.job_id
        if newest and status.state == "preempted" and exit_code != EXIT_PREEMPTED:
            # Killed before it could have itself started again: another rank of it had died.
            restart(run, job, status.attempts[-1].kind, task_of(run))
        return None
    else:
        dead = Dead(job, exit_cause.cause_of_no_start(job, exit_code), seen, started=False)
    outcome = _close(run, dead)
    if outcome and outcome.state == "preempted":
        restart(run, job, outcome.kind, task_of(run), _node_to_avoid(run, dead))
    if outcome:
        close_session(run, outcome)
    return outcome


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
            if seen_of(status) != dead.seen or not lock.is_held():
                return None
            if not dead.started:
                record = AttemptRecord(len(status.attempts) + 1, dead.job, started=now())
                status.attempts.append(record)
            outcome = final_outcome(run, status, dead)
            if outcome.state == "preempted" and not dead.waits:
                check_own(run, dead.job.job_id)
            status.close(outcome)
            status.write(run.status_file)
    except RunBusyError:
        return None
    return outcome


def _node_to_avoid(run: Run, dead: Dead) -> str | None:
    if dead.outcome.kind in ("preempted", "time limit"):
        return None
    return exit_cause.failed_node(run, dead.job)
