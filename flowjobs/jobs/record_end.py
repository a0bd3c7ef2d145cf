"""Record the outcome of a dead attempt, once, under the run's lock."""

from dataclasses import replace

from flowjobs.errors import RunBusyError
from flowjobs.jobs import exit_cause
from flowjobs.jobs.dead_jobs import DeadJob, final_outcome, version_of
from flowjobs.jobs.origin import check_own
from flowjobs.runs.lock import RECONCILE, RunLock, Verdict, system_lock_decides
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    EXIT_CANCELLED,
    EXIT_PREEMPTED,
    AttemptRecord,
    JobInfo,
    Outcome,
    now,
)
from flowjobs.slurm.jobs import Gone


def record_dead_attempt(run: Run, dead: DeadJob) -> Outcome | None:
    """Record how a run's newest attempt ended.

    Returns:
        The outcome as it is on disk: "preempted" if the run is to be started again. None if an
        attempt has started since it was looked at, or somebody else has recorded it.
    """

    def judge(holder: JobInfo, lock_is_free: bool | None) -> Verdict:
        # Where Slurm, or the process that waited for it, has said that it is over, what the lock
        # looks like does not count.
        known = dead.job.cluster == "slurm" or dead.job_still_runs
        same = holder.start_id == dead.job.start_id
        return "gone" if known and same else system_lock_decides(holder, lock_is_free)

    me = replace(JobInfo.in_foreground(), cluster=RECONCILE)
    try:
        with RunLock(run.folder, me, judge) as lock:
            status = run.status()
            # To find out the cause took seconds without the lock: an attempt may have begun since.
            if version_of(status) != dead.version or not lock.is_held():
                return None
            if not dead.attempt_began:
                record = AttemptRecord(len(status.attempts) + 1, dead.job, started=now())
                status.attempts.append(record)
            outcome = final_outcome(run, status, dead)
            if outcome.state == "preempted" and not (dead.slurm_restarts_it or dead.job_still_runs):
                check_own(run, dead.job.job_id)
            status.record_outcome_of_dead(outcome, run.metrics_file)
            status.write(run.status_file)
    except RunBusyError:
        return None
    return outcome


def record_end_of_slot(run: Run, job: JobInfo, exit_code: int) -> Outcome | None:
    """Record how a run ended whose process has, while the job lives that gave it a slot.

    Args:
        run: The run.
        job: The job as that process had it.
        exit_code: The process's, by the shell's count (128 + n for a signal).

    Returns:
        The outcome, see `record_dead_attempt`; None if the process has said it itself, or never
        had the run.
    """
    status = run.status()
    attempt, version = status.open_attempt, version_of(status)
    processes = [(known.job.job_id, known.job.host, known.job.pid) for known in status.attempts]
    this = (job.job_id, job.host, job.pid)
    if attempt and processes[-1] == this:
        # Slurm knows nothing of a single process of its job.
        outcome = exit_cause.cause_of(run, attempt, exit_code, answer=Gone())
        return record_dead_attempt(run, DeadJob(attempt.job, outcome, version, job_still_runs=True))
    if attempt or this in processes or exit_code in (0, EXIT_PREEMPTED, EXIT_CANCELLED):
        return None
    outcome = exit_cause.cause_of_no_start(job, exit_code)
    return record_dead_attempt(
        run, DeadJob(job, outcome, version, attempt_began=False, job_still_runs=True)
    )
