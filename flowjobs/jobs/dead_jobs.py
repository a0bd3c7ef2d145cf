"""What became of runs whose jobs have ended unnoticed. Writes nothing and locks nothing.

`flowjobs reconcile` notes what is found here, `flowjobs status` only shows it.
"""

import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from flowjobs.errors import FlowjobsError
from flowjobs.jobs import exit_cause
from flowjobs.jobs.origin import identity_among, noted_identity
from flowjobs.runs.lock import lock_holder
from flowjobs.runs.pack import is_remaining, pack_of
from flowjobs.runs.process import process_lives
from flowjobs.runs.restarts import attempts_without_progress, may_retry
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    CANCELLED,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    AttemptRecord,
    JobInfo,
    Outcome,
    RunStatus,
    cancelled_outcome,
    same_host,
)
from flowjobs.runs.submittable import CLOCKS, Submission, attempts_of
from flowjobs.slurm.controller import JobRow
from flowjobs.slurm.jobs import Gone, JobAnswer, JobIdentity, Known, Unknown, ask
from flowjobs.slurm.waiting import Waiting, why_it_is_silent, why_it_waits

# How many attempts there are, whether the newest one has ended, and why.
Version = tuple[int, bool, str]

# Accounting is some seconds behind the controller, or more: after this long the cause is told as
# far as the log shows it.
# How long Python and torch may take to load before it is said that a job does not report.
REPORTS_WITHIN_S = 120.0
CAUSE_KNOWN_AFTER = timedelta(minutes=10)


@dataclass(frozen=True)
class DeadJob:
    """A run whose newest job ended without recording how.

    Attributes:
        job: The job.
        outcome: How it ended, if nobody starts it again.
        version: What the status said of attempts when it was looked at; see `version_of`.
        slurm_restarts_it: Whether Slurm starts the job again by itself.
        attempt_began: Whether an attempt of the job had begun.
        cause_known: Whether Slurm says how it ended; the log alone does not tell a scancel from
            what may be tried again.
        job_still_runs: Whether it was one process of a job that runs on and can start it again.
        newer: What a job waits for that was submitted since; None if there is none that lives.
    """

    job: JobInfo
    outcome: Outcome
    version: Version
    slurm_restarts_it: bool = False
    attempt_began: bool = True
    cause_known: bool = True
    job_still_runs: bool = False
    newer: Waiting | None = None


# Waiting: the run's newest job is in the queue. Unknown: nothing can be said of it, also where that
# is so for another reason than Slurm's.
Finding = DeadJob | Unknown | Waiting


def find_dead_jobs(runs: Collection[Run], *, at_most_twice: bool = False) -> dict[Run, Finding]:
    """Those of the runs whose newest job has ended unnoticed, or waits, or is unknown.

    Args:
        runs: Those to look at. Slurm is asked about all of them together.
        at_most_twice: See `ask`.
    """
    found: dict[Run, Finding] = {}
    suspects: dict[Run, tuple[RunStatus, JobInfo]] = {}
    jobs: dict[Run, JobIdentity] = {}
    newer: dict[Run, JobIdentity] = {}
    for run in runs:
        try:
            status, entries = run.status(), run.submissions()
            if (attempt := status.open_attempt) and run.is_anothers(attempt) and not entries:
                why = f"{attempt.job.description} trains the run that {run.name} is a copy of"
                found[run] = Unknown(f"{why}: submit it to have it trained here as well")
            elif _awaits_an_end(run, status, entries):
                job = _newest_job(run, status, entries)
                suspects[run] = status, job
                if job.cluster == "slurm":
                    jobs[run] = identity_among(entries, job.job_id, job.log)
                if since := _submitted_since(run, status, entries, job):
                    newer[run] = since
        except (FlowjobsError, OSError) as error:
            found[run] = Unknown(str(error))
    answers = ask({*jobs.values(), *newer.values()}, at_most_twice=at_most_twice)
    for run, (status, job) in suspects.items():
        answer = answers[jobs[run]] if run in jobs else None
        try:
            finding = (
                _find_on_this_machine(run, status, job)
                if answer is None
                else _find_in_slurm(run, status, job, answer)
            )
        except (FlowjobsError, OSError) as error:
            finding = Unknown(str(error))
        # Restarted from here, it would become this user's job.
        if isinstance(finding, DeadJob) and run in jobs and not jobs[run].is_mine():
            words = f"{jobs[run].description} has ended ({finding.outcome.reason})"
            finding = Unknown(f"{words}: it is that user's to reconcile")
        if run in newer:
            finding = _beside_newer_job(finding, job, answer, answers[newer[run]])
        if finding:
            found[run] = finding
    return found


def final_outcome(run: Run, status: RunStatus, dead: DeadJob) -> Outcome:
    """The outcome with what comes of it: "preempted" if the run is, or should be, started again.

    Args:
        run: The run.
        status: Its status, with an attempt for the job that is dead.
        dead: What was found out.
    """
    outcome = dead.outcome
    if run.cancel_requested():
        reason = f"{CANCELLED.reason} ({outcome.reason})"
        return replace(cancelled_outcome(reason), ended=outcome.ended)
    again = dead.slurm_restarts_it or _should_start_again(run, status, dead)
    if outcome.state == "failed" and again:
        reason = f"{outcome.reason}; starts again"
        return replace(outcome, state="preempted", exit_code=EXIT_PREEMPTED, reason=reason)
    if outcome.state == "preempted" and not again:
        return replace(outcome, state="failed", exit_code=EXIT_FAILED)
    return outcome


def version_of(status: RunStatus) -> Version:
    """What must be the same when a finding is noted, since finding it out takes a while."""
    return len(status.attempts), status.open_attempt is None, status.reason


def _awaits_an_end(run: Run, status: RunStatus, entries: Sequence[Submission]) -> bool:
    if status.open_attempt is not None:
        return True
    if not entries or (status.state == "finished" and run.finished()):
        return False
    if attempts_of(entries[-1], status.attempts):
        return status.state == "preempted" and entries[-1].cluster == "slurm"
    # A job that came too late, and was refused or found nothing to do, says nothing of the run.
    ended = status.attempts[-1].ended if status.attempts else None
    submitted = entries[-1].submitted
    if ended is None or submitted >= ended:  # both are noted to the second
        return True
    # By two clocks, but `submit` is known to submit none while an attempt runs.
    at = datetime.fromisoformat(submitted) if entries[-1].mark and submitted else None
    return at is not None and at + CLOCKS >= datetime.fromisoformat(ended)


def _newest_job(run: Run, status: RunStatus, entries: Sequence[Submission]) -> JobInfo:
    if (attempt := status.open_attempt) and not (entries and run.is_anothers(attempt)):
        return attempt.job
    entry = entries[-1]
    host = entry.host or "its node"
    continues = bool(entry.continues)  # else each restart would count as its user's wish
    log = str(run.log_at(entry.log)) if entry.log else entry.log
    start = (entry.cluster, entry.job_id, log, host)
    return JobInfo(*start, pid=0, continues=continues, process=entry.process)


def _submitted_since(
    run: Run, status: RunStatus, entries: Sequence[Submission], job: JobInfo
) -> JobIdentity | None:
    """The Slurm job of a run that was submitted after `job` and has not begun to train it."""
    if not entries or entries[-1].cluster != "slurm" or entries[-1].job_id == job.job_id:
        return None
    if attempts_of(entries[-1], status.attempts):
        return None
    if entries[-1].pack and not is_remaining(run, entries[-1].job_id):
        return None  # it may live for others
    return noted_identity(entries[-1])


def _beside_newer_job(
    finding: Finding | None, job: JobInfo, answer: JobAnswer | None, newer: JobAnswer
) -> Finding | None:
    """What is found of a run that has a job which was submitted since, and has not begun.

    If that lives, it is what a person has done about the older one, and what they look for.

    Args:
        finding: What is found of the older job.
        job: That one.
        answer: Slurm's word on it, if it is Slurm's.
        newer: Slurm's word on the newer one.
    """
    if not isinstance(newer, Known) or newer.over or newer.newest.state == "COMPLETING":
        return finding
    row = newer.newest
    waits = why_it_waits(row) if row.waits else Waiting(f"for job {row.job_id} to resume it")
    if isinstance(finding, DeadJob):
        return replace(finding, newer=waits)  # `reconcile` has still to note it
    # There is no finding (None) while the older one trains, which is then what counts. Nor is there
    # one until accounting knows how it ended, nor while it is COMPLETING: for hours, where its
    # node hangs. Then the newer one is what counts.
    ends = isinstance(answer, Known) and (
        answer.over
        or (answer.newest.state == "COMPLETING" and not answer.restarted_since(job.restart_count))
    )
    return waits if isinstance(finding, Unknown) or (finding is None and ends) else finding


def _find_in_slurm(run: Run, status: RunStatus, job: JobInfo, answer: JobAnswer) -> Finding | None:
    attempt, version = status.open_attempt, version_of(status)
    match answer:
        case Unknown():
            return answer
        case Known() if not answer.over:
            if attempt and answer.restarted_since(job.restart_count):
                if answer.newest.state == "COMPLETING":
                    return None  # Slurm counts the next start, and this one may still save
                return _find_dead_start(run, status, attempt, answer, restarts=True)
            if answer.newest.waits:
                return why_it_waits(answer.newest)
            if pack_of(run, job.job_id):
                return _find_slot(run, status, job)
            return _find_first_sign(status, job, answer.newest)
        case Known() if answer.newest.state == "CANCELLED" and (
            attempt is None or answer.restarted_since(job.restart_count)
        ):
            began = _has_begun(run, status, job)
            outcome = exit_cause.cause_of_no_start(job, answer=answer)
            return DeadJob(job, outcome, version, attempt_began=began)
    if attempt:
        return _find_dead_start(run, status, attempt, answer)
    if _has_begun(run, status, job):
        # It left in good order, but had no time, or no way, to be started again.
        reason = f"{status.reason}; then no job of it was left"
        if isinstance(answer, Gone):
            # It may as well have been cancelled while it waited.
            return Unknown(f"{reason}, and Slurm keeps no record of why: submit it again")
        return DeadJob(job, Outcome("preempted", EXIT_PREEMPTED, reason, kind="preempted"), version)
    if pack_of(run, job.job_id):
        reason = f"job {job.job_id} ended before the run had a slot"
        outcome = Outcome("preempted", EXIT_PREEMPTED, reason, kind="preempted")
        return DeadJob(job, outcome, version, attempt_began=False)
    if isinstance(answer, Gone) and not exit_cause.log_tail(job.log):
        return Unknown(
            f"job {job.job_id} is gone, and Slurm keeps no record of why: submit it again"
        )
    return DeadJob(
        job, exit_cause.cause_of_no_start(job, answer=answer), version, attempt_began=False
    )


def _has_begun(run: Run, status: RunStatus, job: JobInfo) -> bool:
    """Whether there is an attempt of a job, which is that of the open one, or the newest."""
    entry = run.submission(job.job_id)
    own = attempts_of(entry, status.attempts) if entry else []
    return bool(own) or (status.open_attempt is not None and status.open_attempt.job == job)


def _find_slot(run: Run, status: RunStatus, job: JobInfo) -> Waiting | None:
    """Whether a run has no process in its job, which lives, and waits for one."""
    if status.open_attempt or not pack_of(run, job.job_id) or not is_remaining(run, job.job_id):
        return None
    return Waiting(f"for a slot of job {job.job_id}")


def _find_first_sign(status: RunStatus, job: JobInfo, row: JobRow) -> Waiting | None:
    """Whether a job runs and has no attempt yet: Python starts, or its node hangs."""
    starts = [known.job.start_id for known in status.attempts]
    begun = status.open_attempt or f"{job.job_id}-{row.restarts}" in starts
    just_started = row.starts and time.time() - row.starts < REPORTS_WITHIN_S
    is_silent = row.state == "RUNNING" and not (begun or just_started)
    return why_it_is_silent(row) if is_silent else None


def _find_dead_start(
    run: Run,
    status: RunStatus,
    attempt: AttemptRecord,
    answer: JobAnswer,
    *,
    restarts: bool = False,
) -> DeadJob | None:
    known = isinstance(answer, Known) and answer.row_of_start(attempt.job.restart_count) is not None
    # Guessed now, it would end for good: on an unknown cause nothing is restarted.
    age = datetime.now(UTC) - datetime.fromisoformat(status.updated)
    if not known and isinstance(answer, Known) and age < CAUSE_KNOWN_AFTER:
        return None  # accounting will know soon
    outcome = exit_cause.cause_of(run, attempt, answer=answer)
    return DeadJob(
        attempt.job, outcome, version_of(status), slurm_restarts_it=restarts, cause_known=known
    )


def _find_on_this_machine(run: Run, status: RunStatus, job: JobInfo) -> Finding | None:
    if not (job.pid or job.job_id.isdecimal()):
        return None  # of submitit's debug executor: the process that submitted it was its job
    pid = job.pid or int(job.job_id)
    is_here = same_host(job.host, socket.gethostname())
    if is_here and process_lives(pid, job.process):
        return _find_slot(run, status, job)
    # A container, too, may have the name of this host, but processes of its own.
    if status.open_attempt and lock_holder(run.folder):
        return None  # its status says what it does
    if not is_here:
        if status.open_attempt:
            return Unknown(
                f"{job.description} seems to be gone: reconcile it there, or submit it again"
            )
        return Unknown(f"whether its job on {job.host} starts cannot be seen from here: ask there")
    if status.open_attempt:
        return DeadJob(job, exit_cause.cause_of(run, status.open_attempt), version_of(status))
    if job.cluster != "local":
        return None
    return DeadJob(job, exit_cause.cause_of_no_start(job), version_of(status), attempt_began=False)


def _should_start_again(run: Run, status: RunStatus, dead: DeadJob) -> bool:
    """Whether the run is to be started again, if the scheduler does not do it."""
    outcome = dead.outcome
    # Unknown starts nothing: the end may have been a scancel.
    if outcome.state == "cancelled" or not dead.cause_known:
        return False
    if dead.job.cluster != "slurm" and not dead.job_still_runs:
        return False
    restarts = run.config().restarts
    if outcome.kind in ("preempted", "time limit", exit_cause.NOT_LAUNCHED):
        return attempts_without_progress(status.attempts) + 1 < restarts.give_up_after
    return bool(status.attempts) and may_retry(status.attempts, outcome.kind, restarts)
