"""Record how dead attempts ended; restart those that may be retried.

Asked by the last lines of a batch script and by `flowjobs reconcile`. The next attempt of a run
does the same at its own start (runs/attempt.py). First it is found out (jobs/dead_jobs.py), which
may take long; then it is written down, under the run's lock and only if no attempt has started
meanwhile; then the run is started again; and W&B, which may not answer, comes last.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from flowjobs.config import RestartConfig
from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.jobs import exit_cause
from flowjobs.jobs.current_job import RunningJob, running_job
from flowjobs.jobs.dead_jobs import DeadJob, find_dead_jobs, version_of
from flowjobs.jobs.record_end import record_dead_attempt
from flowjobs.jobs.restart import restart, resubmit
from flowjobs.jobs.tasks import task_of
from flowjobs.runs.hint import hint
from flowjobs.runs.lock import lock_holder
from flowjobs.runs.pack import Pack, pack_of
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    EXIT_CANCELLED,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    JobInfo,
    Outcome,
    RunStatus,
)
from flowjobs.runs.submittable import Submittable
from flowjobs.slurm.jobs import Unknown
from flowjobs.slurm.waiting import Waiting
from flowjobs.tracking.process import close_session, pending_outcome

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


def reconcile(runs: Iterable[Run]) -> list[Reconciled]:
    """Record how silently dead jobs ended; restart the runs that may be retried.

    Slurm is asked once about all of them. Then W&B is told, also what could not be told before,
    which may take a minute a run.

    Args:
        runs: Those to look at.

    Returns:
        Those whose end was recorded, and those of which it is unknown: these stay as they are.
    """
    runs = _with_those_beside(runs)
    results = []
    again: dict[Submittable, tuple[DeadJob, str | None]] = {}
    for run, found in find_dead_jobs(runs).items():
        if isinstance(found, Waiting):
            continue
        if isinstance(found, Unknown):
            results.append(Reconciled(run, unclear=found.why))
            continue
        try:
            outcome = record_dead_attempt(run, found)
        except (FlowjobsError, OSError) as error:
            logger.error("%s: %s", run.name, error)
            continue
        if outcome:
            results.append(Reconciled(run, outcome))
        if outcome and outcome.state == "preempted" and not found.slurm_restarts_it:
            # Once, however many share the job.
            avoid = _node_to_avoid(run, found)
            again[pack_of(run, found.job.job_id) or run] = found, avoid
    # After all are written down: a new job of a pack trains what their status leaves open.
    for left, (found, avoid) in again.items():
        try:
            with left.one_submits():
                if isinstance(left, Pack) and not left.remaining(found.job.job_id):
                    why = "its runs are done, cancelled, or have newer jobs"
                    logger.info("%s is not continued: %s", left.name, why)
                    continue
                if busy := _newer_job(left, found.job):
                    logger.info("%s already has %s", left.name, busy)
                    continue
                new = resubmit(left, found.job, task_of(left), avoid)
            logger.info("%s continues as job %s", left.name, new)
        except (FlowjobsError, OSError) as error:
            logger.error("%s: %s", left.name, error)
    for run in runs:
        if lock_holder(run.folder) is None and pending_outcome(run):  # else its next attempt tells
            close_session(run)
    return results


def _newer_job(run: Submittable, dead: JobInfo) -> RunningJob | None:
    """The job of a run that was submitted after one that is dead, if it waits or runs."""
    newest = run.newest_job()
    if not isinstance(run, Run) or newest is None or newest.job_id == dead.job_id:
        return None
    return running_job(run)


def _with_those_beside(runs: Iterable[Run]) -> list[Run]:
    """The runs, and those whose job they share: that is started again for all of them."""
    found = dict.fromkeys(runs)
    for run in list(found):
        newest = run.newest_job()
        if newest and newest.pack:
            with contextlib.suppress(ConfigError):  # the pack's folder is gone
                found |= dict.fromkeys(Pack(run.study, newest.pack).remaining(newest.job_id))
    return [*found]


def handle_pack_end(pack: Pack, job: JobInfo, exit_code: int) -> dict[Run, Outcome]:
    """Record how the runs of a pack ended whose job does, and restart it for those that are left.

    Asked by the last lines of the job's batch script.

    Args:
        pack: The pack.
        job: The job that ends.
        exit_code: What its srun returned, not 0.

    Returns:
        How those ended that have not said so themselves.
    """
    recorded: dict[Run, Outcome] = {}
    begins_later = exit_code == EXIT_PREEMPTED or exit_cause.launch_failure(job) is not None
    if begins_later and not _has_begun(pack, job):
        # Where jobs cannot be requeued, each try is a job of its own.
        tries = [entry for entry in pack.submissions() if not pack.starts_of(entry.job_id)]
        again = job.restart_count + len(tries) <= RestartConfig().give_up_after
        if again:
            restart(pack, job, task_of(pack), exit_cause.node_that_refused(job))
        if again or exit_code == EXIT_PREEMPTED:
            return recorded
    if exit_code in (EXIT_PREEMPTED, EXIT_CANCELLED):
        return recorded  # the job left in good order: it has written down all, and started it again
    unclear: set[Run] = set()

    @contextlib.contextmanager
    def keeping_others(run: Run) -> Iterator[None]:
        try:
            yield
        except (FlowjobsError, OSError) as error:
            again = hint("reconcile", run.name, study=run.study)
            logger.error("how %s ended is not recorded, `%s` does it: %s", run.name, again, error)
            unclear.add(run)

    begun = False
    for run in pack.remaining(job.job_id):
        with keeping_others(run):
            status = run.status()
            starts = [known.job.start_id for known in status.attempts]
            begun |= job.start_id in starts
            if status.open_attempt and starts[-1] == job.start_id:
                cause = exit_cause.cause_of(run, status.open_attempt, exit_code)
                dead = DeadJob(status.open_attempt.job, cause, version_of(status))
                if outcome := record_dead_attempt(run, dead):
                    recorded[run] = outcome
    remaining = pack.remaining(job.job_id)
    # Killed, and it had begun: another try may do. One that never began would end so again.
    if remaining and begun and exit_code > 128:
        restart(pack, job, task_of(pack), job.host)
    else:
        cause = _given_up(exit_cause.cause_of_no_start(job, exit_code))
        for run in remaining:  # they would end so again
            with keeping_others(run):
                dead = DeadJob(job, cause, version_of(run.status()), attempt_began=False)
                if run not in unclear and (outcome := record_dead_attempt(run, dead)):
                    recorded[run] = outcome
    for run in recorded:
        close_session(run)
    return recorded


def _given_up(cause: Outcome) -> Outcome:
    """The cause of what has been tried often enough."""
    if cause.kind != exit_cause.NOT_LAUNCHED:
        return cause
    return replace(cause, state="failed", exit_code=EXIT_FAILED, kind="never started")


def _has_begun(pack: Pack, job: JobInfo) -> bool:
    """Whether this start of a pack's job is on record, or the job has another one after it."""
    newest = pack.newest_job()
    continued = newest is not None and newest.job_id != job.job_id
    return continued or pack.starts_of(job.job_id) > job.restart_count


def handle_job_end(run: Run, job: JobInfo, exit_code: int) -> Outcome | None:
    """Record how a run's attempt ended whose job does, and restart it if it may be retried.

    Asked by the last lines of the job's batch script.

    Args:
        run: The run.
        job: The job that ends.
        exit_code: What its srun returned, not 0.

    Returns:
        How the attempt ended; None if it has said so itself.
    """
    status = run.status()
    attempt, version = status.open_attempt, version_of(status)
    starts = [known.job.start_id for known in status.attempts]
    if exit_code == EXIT_PREEMPTED and job.start_id not in starts:
        # It has not got the run, since another attempt may still have it: later, then.
        if job.restart_count < run.config().restarts.give_up_after:
            restart(run, job, task_of(run))
        return None
    if attempt and attempt.job.start_id == job.start_id:
        dead = DeadJob(job, exit_cause.cause_of(run, attempt, exit_code), version)
    elif attempt or job.start_id in starts or exit_code == EXIT_CANCELLED:
        # It has said so itself, or another job holds the run.
        entries = run.submissions()  # none, if the disk did not take the line
        newest = starts[-1:] == [job.start_id] and (not entries or entries[-1].job_id == job.job_id)
        if newest and status.state == "preempted" and exit_code != EXIT_PREEMPTED:
            # Killed before it could have itself started again: another rank of it had died.
            restart(run, job, task_of(run))
        return None
    elif run.finished() or not _is_newest(run, job, status):
        # Refused for a mistyped option, say, before the run knew of it: its own output says why.
        return None
    else:
        dead = DeadJob(
            job, exit_cause.cause_of_no_start(job, exit_code), version, attempt_began=False
        )
    outcome = record_dead_attempt(run, dead)
    if outcome and outcome.state == "preempted":
        restart(run, job, task_of(run), _node_to_avoid(run, dead))
    if outcome:
        close_session(run)
    return outcome


def _is_newest(run: Run, job: JobInfo, status: RunStatus) -> bool:
    """Whether the run has no job but this, or none after it."""
    noted = [entry.job_id for entry in run.submissions()]
    begun = [attempt.job.job_id for attempt in status.attempts]
    # The disk may not have taken its line.
    known = noted if job.job_id in noted or not begun else begun
    return known[-1:] in ([], [job.job_id])


def _node_to_avoid(run: Run, dead: DeadJob) -> str | None:
    if dead.outcome.kind in ("preempted", "time limit"):
        return None
    if dead.outcome.kind == exit_cause.NOT_LAUNCHED:
        return exit_cause.node_that_refused(dead.job)
    return exit_cause.failed_node(run, dead.job)
