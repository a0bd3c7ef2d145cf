"""What Slurm knows of a job of ours, in three values: this is it, it is gone, or unknown.

A job is not its id: a cluster uses ids again, two clusters on one home use the same ones, and a
record may be another user's.
"""

import functools
import os
import pwd
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flowjobs.errors import SubmissionError
from flowjobs.slurm.cluster import cluster_name
from flowjobs.slurm.controller import ENDED, REVOKED, JobRow, queue
from flowjobs.slurm.sacct import accounting
from flowjobs.slurm.submission import CLOCKS_S

# Accounting's last row of a job may be that of an earlier start, if it says one of these: the next
# start's comes some seconds later, or when a database that was away is back.
AGAIN = frozenset({"REQUEUED", "PREEMPTED", "NODE_FAIL"})
SETTLED_AFTER_S = 600.0


@dataclass(frozen=True)
class JobIdentity:
    """What tells a job from every other one: noted at its submission, compared with each answer.

    Attributes:
        job_id: Slurm's id (`12_3` for an array task).
        mark: Ours, that Slurm gives back; empty for a job that was submitted by hand.
        cluster: Slurm's name of its cluster; empty if that is not known.
        uid: Its user's; None if that is not known.
        name: The job's; empty if that is not known.
        submitted: When sbatch accepted it, in seconds of the epoch; 0 if that is not known.
        log: The file that its output goes to; empty if that is not known.
    """

    job_id: str
    mark: str = ""
    cluster: str = ""
    uid: int | None = None
    name: str = ""
    submitted: float = 0.0
    log: str = ""

    def is_mine(self) -> bool:
        """Whether it is this user's, so that it may be cancelled and started again by them."""
        return self.uid in (None, os.getuid())

    def matches(self, row: JobRow) -> bool:
        """Whether a row is on this job, and not on another one that has or had its id."""
        # Accounting has one row for all tasks of an array that ended before they were told apart.
        if row.job_id != self.job_id and (row.log or not _is_among(self.job_id, row.job_id)):
            return False
        if self.uid not in (None, row.uid) or (
            self.cluster and row.cluster and self.cluster != row.cluster
        ):
            return False
        if self.mark and row.marks:
            return self.mark in row.marks
        # By hand there is no mark, and some sites drop comments. A requeued job's time is later.
        in_time = row.submitted >= self.submitted - CLOCKS_S
        named = self.name in ("", row.name)
        if self.log and Path(row.log).is_absolute():
            # For a job that we submitted the log alone decides: some sites rewrite names as well.
            return in_time and (named or bool(self.mark)) and row.logs_to(Path(self.log).parent)
        return in_time and named

    @property
    def description(self) -> str:
        """The job, with what sets it apart from those that can be asked for here."""
        if self.uid is None or self.is_mine():
            return f"job {self.job_id}"
        return f"job {self.job_id} of {user_name(self.uid)}"


@dataclass(frozen=True)
class Known:
    """Slurm knows the job.

    Attributes:
        newest: The controller's word on it; accounting's where that has forgotten the job.
        starts: Accounting's rows, one for each start, oldest first: some seconds behind, and none
            where it was not asked or does not answer.
    """

    newest: JobRow
    starts: tuple[JobRow, ...] = ()

    @property
    def over(self) -> bool:
        """Whether it will not run any more."""
        return self.newest.state in ENDED

    def restarted_since(self, restart: int) -> bool:
        """Whether Slurm has started, or will start, the job again after that start of it."""
        if self.newest.restarts is not None:
            return self.newest.restarts > restart
        return len(self.starts) > restart + 1

    def row_of_start(self, restart: int) -> JobRow | None:
        """How that start of the job ended (0 is the first); None if that is not known (yet)."""
        # The controller knows how a job ended some seconds before accounting does.
        if self.newest.restarts == restart and self.over:
            return self.newest
        rows = [row for row in self.starts[restart : restart + 1] if row.ended is not None]
        return rows[0] if rows else None


@dataclass(frozen=True)
class Gone:
    """Slurm has forgotten the job: where nobody keeps books, how it ended is never known."""


@dataclass(frozen=True)
class Unknown:
    """Nothing can be said of the job now, or from here.

    Attributes:
        why: As a sentence.
    """

    why: str


JobAnswer = Known | Gone | Unknown


def ask_one(job: JobIdentity) -> JobAnswer:
    """`ask` about one job."""
    return ask([job])[job]


def ask(
    jobs: Collection[JobIdentity], *, at_most_twice: bool = False
) -> dict[JobIdentity, JobAnswer]:
    """Ask Slurm about all these jobs together.

    Once, if all of them wait or run in their first start; else accounting too; and where there is
    none, which cluster this is: only the one that had a job can say that it is gone.

    Args:
        jobs: Those to ask about.
        at_most_twice: Leave out the last question: some that are gone are then unknown.
    """
    if not jobs:
        return {}
    try:
        # By user: a study's runs may have been submitted by several.
        rows = queue({os.getuid(), *(job.uid for job in jobs if job.uid is not None)})
    except SubmissionError as error:
        return {job: Unknown(str(error)) for job in jobs}
    queued = _by_id(rows)
    known = {job: row for job in jobs for row in _rows_of(job, queued)}
    # Only accounting has the earlier starts of a job that was started again.
    told = {job for job, row in known.items() if row.state not in ENDED and not row.restarts}
    try:
        books = _accounting_of(job for job in jobs if job not in told)
        silent = ""
    except SubmissionError as error:
        books, silent = [], str(error)
    answers: dict[JobIdentity, JobAnswer] = {}
    # The queue names the cluster in each row: one question less where it has any.
    here = {row.cluster for row in rows if row.cluster}
    by_id = _by_id(books or ())
    arrays = {row.job_id.partition("_")[0]: row for row in books or () if "_" in row.job_id}
    for job in jobs:
        rows = _rows_of(job, by_id)
        starts = tuple([row for row in rows if row.job_id == job.job_id] or rows)
        newest = known[job] if job in known else starts[-1] if starts else None
        if newest and newest.state == REVOKED:
            answers[job] = Unknown(
                f"{job.description} waits, or runs, on another cluster of the federation: ask from "
                "there"
            )
        elif job in known:
            answers[job] = Known(known[job], starts)
        elif starts:
            answers[job] = _last_of(job, starts)
        elif (array := arrays.get(job.job_id.partition("_")[0])) and _is_task_of(job, array):
            # Slurm forgets at once a task that is cancelled by itself before it has started; any
            # other of an array that both know is known to one of them.
            answers[job] = Known(replace(array, job_id=job.job_id, state="CANCELLED", signal=0))
        elif _may_be_among(queued.get(job.job_id, ()), job):
            answers[job] = Unknown(
                f"a job {job.job_id} of yours is in the queue, with another name, comment and log: "
                f"whether it is that one is unknown (scontrol show job {job.job_id})"
            )
        elif books is None and job.cluster and job.uid == os.getuid():
            if not here and not at_most_twice:
                here = {cluster_name()}
            why = _why_not(job, here, "there is no accounting")
            answers[job] = Gone() if job.cluster in here else Unknown(why)
        else:
            answers[job] = Unknown(_why_not(job, here, silent or "accounting has no word of it"))
    return answers


def _accounting_of(jobs: Iterable[JobIdentity]) -> list[JobRow] | None:
    # By the array: tasks that ended before they were told apart are on one row of it.
    submitted: dict[str, float] = {}
    for job in jobs:
        array = job.job_id.partition("_")[0]
        submitted[array] = min(job.submitted, submitted.get(array, job.submitted))
    return accounting(submitted)


def _by_id(rows: Iterable[JobRow]) -> Mapping[str, list[JobRow]]:
    """Rows by the ids of the jobs that they may be on: a study has thousands of both."""
    found: dict[str, list[JobRow]] = {}
    for row in rows:
        for key in {row.job_id, _together(row)}:
            found.setdefault(key, []).append(row)
    return found


def _rows_of(job: JobIdentity, by_id: Mapping[str, list[JobRow]]) -> list[JobRow]:
    keys = {job.job_id, job.job_id.partition("_")[0]}
    return [row for key in sorted(keys) for row in by_id.get(key, ()) if job.matches(row)]


def _may_be_among(rows: Iterable[JobRow], job: JobIdentity) -> bool:
    """Whether a living job of this user has the id there, and nothing says that it is not this."""
    return job.is_mine() and any(
        row.uid == os.getuid()
        and row.state not in ENDED
        and not (job.mark and row.marks)
        and (not job.cluster or row.cluster in ("", job.cluster))
        for row in rows
    )


def _together(row: JobRow) -> str:
    """The array of tasks that a row is on together (`12_[3-5]`), or the job's id."""
    return row.job_id.partition("_[")[0]


def _is_among(job_id: str, together: str) -> bool:
    """Whether a task (`12_4`) is among those that Slurm has together (`12_[3-5,9%2]`, `12`)."""
    base, _, task = job_id.partition("_")
    array, _, listed = together.partition("_[")
    if array != base:
        return False
    return not listed or (task.isdigit() and int(task) in _tasks(listed))


@functools.cache
def _tasks(listed: str) -> frozenset[int]:
    found: set[int] = set()
    for part in listed.partition("]")[0].partition("%")[0].split(","):
        first, _, last = part.partition(":")[0].partition("-")
        step = part.partition(":")[2]
        if first.isdigit():
            end = int(last) if last.isdigit() else int(first)
            found |= set(range(int(first), end + 1, int(step) if step.isdigit() else 1))
    return frozenset(found)


def _is_task_of(job: JobIdentity, array: JobRow) -> bool:
    """Whether a job is a task of the array that another row is on."""
    return "_" in job.job_id and replace(job, job_id=array.job_id).matches(array)


def _last_of(job: JobIdentity, starts: tuple[JobRow, ...]) -> JobAnswer:
    """The answer where the controller does not know the job (any more) and accounting does."""
    last = starts[-1]
    settled = last.ended is not None and time.time() - last.ended > SETTLED_AFTER_S
    if settled and last.state == "REQUEUED":
        # The controller lost it before its next start: nothing will run it any more.
        last = replace(last, state="PREEMPTED")
    if last.state in ENDED and (settled or last.state not in AGAIN):
        return Known(last, starts)
    return Unknown(
        f"the controller does not know {job.description}, and accounting says {last.state}"
    )


def _why_not(job: JobIdentity, here: Collection[str], accounting: str) -> str:
    if not job.is_mine():
        return f"Slurm says nothing of {job.description}: ask as that user"
    if job.cluster and here and job.cluster not in here:
        return (
            f"{job.description} is of the cluster {job.cluster}, and "
            f"{', '.join(sorted(here)) or 'none'} answers here: ask from there"
        )
    return f"the controller does not know {job.description}, and {accounting}"


def user_name(uid: int) -> str:
    """A user's name; "user 1234" if this machine does not know it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
