"""Which job of a run waits or runs now; unknown is an answer."""

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flowjobs.errors import RunHolderUnknownError, SubmissionError
from flowjobs.jobs.array import in_unnoted_arrays, unnoted_tasks
from flowjobs.jobs.lock_judge import judge_for
from flowjobs.jobs.origin import noted_identity
from flowjobs.runs.file_lock import SAY_AFTER_S
from flowjobs.runs.hint import hint
from flowjobs.runs.lock import (
    LEAVING_WAIT_S,
    POLL_S,
    Verdict,
    lock_holder,
    system_lock_decides,
)
from flowjobs.runs.newest_job import ended_for_good, local_job
from flowjobs.runs.pack import is_remaining
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo, RunStatus
from flowjobs.runs.submittable import Submission, attempts_of
from flowjobs.slurm.client import is_here
from flowjobs.slurm.controller import ENDED, JobRow, queue
from flowjobs.slurm.jobs import JobAnswer, JobIdentity, Known, Unknown, ask
from flowjobs.slurm.waiting import Waiting, why_it_waits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunningJob:
    """A job of a run that is pending or running, or the process that holds the run.

    Attributes:
        description: Which it is.
        state: As Slurm has it, in small letters; "" of one that is not Slurm's.
        waits: What it waits for, if Slurm says that.
        job_id: Id of a job that was submitted; "" of a process that is only known to hold the run.
    """

    description: str
    state: str = ""
    waits: Waiting | None = None
    job_id: str = ""

    def __str__(self) -> str:
        state = f" ({self.state})" if self.state else ""
        waits = f", waits {self.waits.why}" if self.waits else ""
        return f"{self.description}{state}{waits}"


def running_job(run: Run, *, cancelled: bool = False) -> RunningJob | None:
    """The run's job that is pending or running; None if there is none.

    Args:
        run: The run.
        cancelled: Its user has said that its jobs are gone: so is then one that is unknown.

    Raises:
        SubmissionError: There was a Slurm job, and what became of it is unknown.
    """
    found = running_jobs([run]).get(run)
    if isinstance(found, SubmissionError):
        if cancelled:
            return None
        raise found
    return found


def job_besides(run: Run, own: str | None, *, cancelled: bool) -> RunningJob | None:
    """A job of the run that was submitted and waits or runs, beside the one that asks.

    Args:
        run: The run.
        own: The id of the asker's own job; None outside of a job of the run.
        cancelled: See `running_job`.

    Raises:
        SubmissionError: That is unknown.
    """
    found = running_job(run, cancelled=cancelled)
    return found if found and found.job_id not in ("", own) else None


def running_jobs(
    runs: Sequence[Run], statuses: Mapping[Run, RunStatus] | None = None
) -> dict[Run, RunningJob | SubmissionError]:
    """Those of the runs that have a job which is pending or running; or of which that is unknown,
    and why. Slurm is asked about all of them together.

    Args:
        runs: The runs.
        statuses: Those that are known already.
    """
    entries: dict[Run, list[Submission]] = {}
    jobs: dict[Run, list[JobIdentity]] = {}
    found: dict[Run, RunningJob | SubmissionError] = {}
    for run, noted in jobs_of(runs, statuses).items():
        try:
            if isinstance(noted, Exception):
                raise noted
            entries[run] = noted
            jobs[run] = [
                noted_identity(entry)
                for entry in noted
                # A job that it shares may live on for others.
                if entry.cluster == "slurm" and (not entry.pack or is_remaining(run, entry.job_id))
            ]
        except (SubmissionError, OSError) as error:
            found[run] = _unreadable(run, error)
    answers = ask([job for of_run in jobs.values() for job in of_run])
    try:
        elsewhere = in_unnoted_arrays({run.study for run in runs})
    except OSError as error:
        elsewhere = {run: str(_unreadable(run, error)) for run in runs}
    for run, of_run in jobs.items():
        try:
            busy = _busy_with(run, entries[run], of_run, answers)
        except OSError as error:
            busy = _unreadable(run, error)
        if busy:
            found[run] = busy
        elif run in elsewhere:
            found[run] = SubmissionError(elsewhere[run])
    return found


def _unreadable(run: Run, error: Exception) -> SubmissionError:
    return SubmissionError(f"whether a job of {run.name} runs is unknown: {error}")


def _busy_with(
    run: Run,
    entries: Sequence[Submission],
    jobs: Sequence[JobIdentity],
    answers: Mapping[JobIdentity, JobAnswer],
) -> RunningJob | SubmissionError | None:
    for job in reversed(jobs):
        match answers[job]:
            case Known(row) as known if not known.over and (
                # The process of a completing job may still save: the next job waits for it.
                row.state != "COMPLETING" or _comes_back(run, known)
            ):
                waits = why_it_waits(row) if row.waits else None
                return RunningJob(job.description, row.state.lower(), waits, job.job_id)
    # Older ones do not matter: the newest was submitted when they were gone.
    newest = jobs[-1] if jobs and jobs[-1].job_id == entries[-1].job_id else None
    # Unknown is not gone: beside a job that lives, a second one would train the same run.
    if (
        newest
        and isinstance(answer := answers[newest], Unknown)
        and not ended_for_good(run, entries[-1])
    ):
        cancel = hint("cancel", run.name, study=run.study)
        return SubmissionError(
            f"what became of {newest.description} of {run.name} is unknown, so nothing is "
            f"submitted: {answer.why}; if you know that it is gone, `{cancel}` and submit again"
        )

    def judge(holder: JobInfo, lock_is_free: bool | None) -> Verdict:
        verdict = judge_for(run, JobInfo.in_foreground())(holder, lock_is_free)
        return "gone" if verdict == "leaving" else verdict  # as above

    if holder := lock_holder(run.folder, judge):
        return RunningJob(holder)
    local = local_job(run, entries)
    return RunningJob(local, job_id=entries[-1].job_id) if local else None


def wait_until_ended(run: Run) -> None:
    """Wait for a process of this run that was cancelled; those of Slurm's jobs are not waited for.

    Once its cancel file is deleted, it would not know that it is to leave for good.

    Raises:
        RunHolderUnknownError: It has not ended in time.
    """

    def judge(holder: JobInfo, lock_is_free: bool | None) -> Verdict:
        verdict = system_lock_decides(holder, lock_is_free)
        # The next job waits for a job of Slurm, and that knows what it was told. Who is unknown
        # from here is left to the lock, which says what can be done.
        return "gone" if holder.cluster == "slurm" or verdict == "unknown" else verdict

    started, said = time.monotonic(), False
    while holder := lock_holder(run.folder, judge) or local_job(run, run.submissions()):
        waited_s = time.monotonic() - started
        if waited_s > LEAVING_WAIT_S:
            raise RunHolderUnknownError(
                f"waited {waited_s:.0f} s for {holder}, which was cancelled and has not ended yet; "
                "nothing was started. The same command resumes the run once it has; if it hangs, "
                "end it there (kill -KILL)"
            )
        if waited_s > SAY_AFTER_S and not said:
            logger.warning("waiting for %s to end, up to %.0f s", holder, LEAVING_WAIT_S)
            said = True
        time.sleep(POLL_S)


def _comes_back(run: Run, job: Known) -> bool:
    """Whether Slurm will start a job that ends again."""
    entry, attempts = run.submission(job.newest.job_id), run.status().attempts
    own = attempts_of(entry, attempts) if entry else attempts[-1:]
    starts = [known.job.restart_count for known in own if known.job.job_id == job.newest.job_id]
    return job.restarted_since(max(starts, default=0))


def jobs_of(
    runs: Collection[Run], statuses: Mapping[Run, RunStatus] | None = None
) -> dict[Run, list[Submission] | SubmissionError | OSError]:
    """The submissions of each run, and those Slurm jobs of it that could not be noted.

    That of its open attempt, whose log tells it from another one that has got its id since; and
    one that waits, or has just started, whose submitter died as sbatch had taken it, alone or as a
    task of an array.

    Args:
        runs: The runs. Slurm is asked once, if at all; for arrays once more.
        statuses: Those that are known already.

    Returns:
        Instead of the jobs why they are unknown: the run cannot be read, or there may be one that
        was not noted, and Slurm does not answer.
    """
    known = statuses or {}
    mine: list[JobRow] | SubmissionError | None = None
    tasks: Mapping[Run, list[Submission]] = {}
    with contextlib.suppress(SubmissionError, OSError):  # `running_jobs` says that it is unknown
        tasks = unnoted_tasks({run.study for run in runs})
    found: dict[Run, list[Submission] | SubmissionError | OSError] = {}
    for run in runs:
        try:
            entries = run.submissions()
            noted = {entry.job_id for entry in entries}
            entries += [task for task in tasks.get(run, ()) if task.job_id not in noted]
            if run.batch_file.exists() and is_here():
                if mine is None:
                    mine = _jobs_of_this_user()
                if isinstance(mine, SubmissionError):
                    raise mine
                entries += _unnoted(run, entries, mine)
            status = known[run] if run in known else run.status()
            attempt = status.open_attempt
            if attempt and attempt.job.cluster == "slurm" and not run.is_anothers(attempt):
                job_id, log = attempt.job.job_id, attempt.job.log
                if log and all(entry.job_id != job_id for entry in entries):
                    entries.append(Submission(job_id, "slurm", "", log))
            found[run] = entries
        except (SubmissionError, OSError) as error:
            found[run] = error
    return found


def _jobs_of_this_user() -> list[JobRow] | SubmissionError:
    try:
        return [row for row in queue({os.getuid()}) if row.state not in ENDED]
    except SubmissionError as error:
        return error


def _unnoted(run: Run, entries: Sequence[Submission], mine: Iterable[JobRow]) -> list[Submission]:
    noted = {entry.job_id for entry in entries}
    return [
        Submission(row.job_id, "slurm", "", row.log, slurm_cluster=row.cluster)
        for row in mine
        if row.logs_to(run.logs) and row.job_id not in noted
    ]
