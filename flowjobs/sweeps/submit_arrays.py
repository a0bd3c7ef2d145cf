"""Submits many runs as Slurm arrays: one for each set of resources, more where one is too large."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flowjobs.errors import FlowjobsError, SubmissionError, SubmissionUnknownError
from flowjobs.jobs.array import new_array
from flowjobs.jobs.deferred_signals import signals_deferred
from flowjobs.jobs.run_stages import Member
from flowjobs.jobs.snapshot import CodePlan, carry_out_together
from flowjobs.jobs.submit import submit_array
from flowjobs.jobs.tasks import ArrayTask
from flowjobs.runs.files import flush_files
from flowjobs.runs.pack import Pack, new_pack
from flowjobs.runs.run import Run, undone_if_refused
from flowjobs.runs.submittable import Submittable
from flowjobs.slurm.cluster import cluster_settings
from flowjobs.slurm.controller import set_parallel
from flowjobs.sweeps.plan import resource_sets

# What sbatch says where fewer jobs, or a shorter array, would have been taken. The policy's text is
# the same for a time limit that is too long: that one is refused for a single task as well.
TOO_MANY = re.compile(
    "submit limit|temporarily unable to accept|array specification|job count", re.IGNORECASE
)
# The same, and it can be nothing else: AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit.
SURELY_TOO_MANY = re.compile(
    "SubmitJobs?(Per|Limit)|temporarily unable to accept|job count", re.IGNORECASE
)
# Runs of a job by its slots, at least: the next one is there when one ends, and a sweep that is
# given more --parallel later has jobs left to start.
RUNS_PER_SLOT = 4
# The default of MaxArraySize, where the cluster does not say: tasks 0 to 1000.
ARRAY_SIZE = 1001

T = TypeVar("T")


@dataclass
class Submitted:
    """What came of a submission.

    Attributes:
        jobs: The arrays, by id, and how many runs each has.
        taken: The runs of these.
        left: Runs that the cluster does not take now.
        why: What it said.
        notes: Notes to print on the runs.
    """

    jobs: dict[str, int] = field(default_factory=dict)
    taken: list[Member] = field(default_factory=list)
    left: list[Member] = field(default_factory=list)
    why: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ArrayLeft:
    """Runs of one array.

    Attributes:
        runs: How many are left.
        slots: How many share a job.
    """

    runs: int
    slots: int = 1


def jobs_at_once(parts: Sequence[ArrayLeft], parallel: int) -> list[int]:
    """How many jobs of each array run at a time, so that so many runs do in all.

    Each array gets its part by the runs that it has left, and at least one job: Slurm has no less,
    and where the arrays are many, more runs than `parallel` are trained at a time.
    """
    total = sum(part.runs for part in parts)
    jobs = [1] * len(parts)

    def lacks(number: int) -> float:
        return parallel * parts[number].runs / total - jobs[number] * parts[number].slots

    def has_room(number: int) -> bool:
        more = [n + (other == number) for other, n in enumerate(jobs)]
        return at_a_time(parts, jobs) < at_a_time(parts, more) <= parallel

    while room := [*filter(has_room, range(len(parts)))]:
        jobs[max(room, key=lacks)] += 1
    return jobs


def at_a_time(parts: Sequence[ArrayLeft], jobs: Sequence[int]) -> int:
    """How many runs are trained at a time if so many jobs of each array run."""
    return sum(min(n * part.slots, part.runs) for n, part in zip(jobs, parts, strict=True))


def new_arrays(members: Sequence[Member], parallel: int | None, slots: int) -> list[ArrayLeft]:
    """The arrays that runs would be submitted as, where the cluster has room for all of them."""
    largest = _largest_array() if members else 1
    sets = [tasks_of(of_set, parallel, slots) for of_set in resource_sets(members)]
    return [part for tasks in sets for part in _parts(tasks, largest, slots)]


def _parts(tasks: Sequence[Sequence[Member]], size: int, slots: int) -> list[ArrayLeft]:
    """Tasks as arrays of so many at most."""
    chunks = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    return [ArrayLeft(sum(map(len, chunk)), slots) for chunk in chunks]


def submit_arrays(
    members: Sequence[Member],
    code: Sequence[CodePlan],
    name: str,
    parallel: int | None,
    slots: int,
    done: Submitted,
) -> None:
    """Make the runs and submit them, as few arrays.

    The caller is the only one who does that in the study; see `jobs.array.submitting`.

    Args:
        members: The runs to start; at least one.
        code: What code each of them keeps.
        name: The arrays' name in the queue.
        parallel: How many run at a time.
        slots: How many share a job.
        done: Is told of each array as soon as it is submitted: the next may be refused, or Ctrl-C
            come.

    Raises:
        SubmissionError: An array was refused: its runs are as they were, and none follows it.
        SubmissionUnknownError: Whether an array was taken is unknown.
    """
    code_of = dict(zip((member.run for member in members), code, strict=True))
    largest, free = _largest_array(), parallel
    # One array has one set of options: sbatch takes no other for a single task.
    sets = [tasks_of(of_set, parallel, slots) for of_set in resource_sets(members)]
    for number, tasks in enumerate(sets):
        later = [part for of_set in sets[number + 1 :] for part in _parts(of_set, largest, slots)]
        waiting = tasks
        size = min(largest, len(waiting))
        taken = False
        while waiting and size:
            parts = [*_parts(waiting, size, slots), *later]
            at_once = None if free is None else jobs_at_once(parts, free)[0]
            try:
                _submit_one(waiting[:size], code_of, name, at_once, slots, done)
            except SubmissionUnknownError:
                raise
            except SubmissionError as error:
                why = str(error)
                # What the cluster has taken of another set says nothing of this one's options.
                full = taken or done.left or (done.jobs and SURELY_TOO_MANY.search(why))
                if not (TOO_MANY.search(why) and (size > 1 or full)):
                    raise
                done.why = why
                size //= 2  # what there is room for is not told: it is found by halving
                continue
            taken = True
            if free is not None and at_once is not None:
                free -= at_a_time(parts[:1], [at_once])
            waiting = waiting[size:]
            size = min(size, len(waiting))
        done.left += itertools.chain(*waiting)


def tasks_of(members: Sequence[T], parallel: int | None, slots: int) -> list[list[T]]:
    """The runs that each task of an array trains, dealt out in turn.

    Args:
        members: The runs; they ask for the same resources.
        parallel: How many run at a time; None: as many as can, so that none waits for a slot.
        slots: How many share a job.
    """
    tasks = math.ceil(len(members) / slots)
    if parallel is not None and slots > 1:
        enough = math.ceil(len(members) / (RUNS_PER_SLOT * slots))
        at_once = max(1, parallel // slots)
        # A multiple: jobs that are left over would train alone at the end.
        tasks = min(tasks, at_once * max(1, enough // at_once))
    return [list(members[task::tasks]) for task in range(tasks)]


def _largest_array() -> int:
    said = cluster_settings().get("MaxArraySize", "")
    return max(1, int(said) if said.isdigit() else ARRAY_SIZE)


def _submit_one(
    tasks: Sequence[Sequence[Member]],
    code_of: dict[Run, CodePlan],
    name: str,
    at_once: int | None,
    slots: int,
    done: Submitted,
) -> None:
    """Submit one array, of which so many tasks run at a time."""
    members = [member for task in tasks for member in task]
    runs, asked = [member.run for member in members], members[0].config.slurm
    array = new_array(runs[0].study)
    with signals_deferred(), undone_if_refused(runs):
        notes = make_runs(members, [code_of[run] for run in runs])
        submitted: Sequence[Submittable] = runs
        if slots > 1:
            shared = [[member.run for member in task] for task in tasks]
            submitted = [new_pack(array.study, name, some, slots, asked) for some in shared]
        task = ArrayTask(str(array.folder))
        job_id = submit_array(array, submitted, name, task, asked, at_once)
        # While signals wait: Ctrl-C ends the command as the block ends.
        done.jobs[job_id] = len(members)
        done.taken += [replace(member, stage="waiting") for member in members]
        done.notes += notes


def make_runs(members: Sequence[Member], code: Sequence[CodePlan]) -> list[str]:
    """Make the folders of runs that are to be started, or bring them up to date.

    Returns:
        Notes to print.
    """
    notes = []
    files = []
    for member in members:
        run = member.run
        if note := run.create(member.config, flush=False):
            notes.append(note)
        files += [run.config_file, run.folder / "run.json"]
        # Any other has been cancelled since the plan was made, and its job ends as it starts.
        if member.stage == "cancelled":
            run.clear_cancel()
    files += carry_out_together(code)
    flush_files(files)
    return notes


def arrays_left(
    members: Iterable[Member],
) -> tuple[dict[str, ArrayLeft], dict[str, FlowjobsError]]:
    """The arrays that runs wait or run in, by id, and why it is unknown of some how many of their
    runs share a job; these count as if each run had its own."""
    left: Counter[str] = Counter()
    slots: dict[str, int] = {}
    unknown: dict[str, FlowjobsError] = {}
    for member in members:
        if member.stage not in ("waiting", "running"):
            continue
        newest = member.run.newest_job()
        if newest and newest.array:
            array_id = newest.job_id.partition("_")[0]
            left[array_id] += 1
            if newest.pack and array_id not in {*slots, *unknown}:
                try:
                    slots[array_id] = Pack(member.run.study, newest.pack).slots
                except FlowjobsError as error:
                    unknown[array_id] = error
    parts = {job_id: ArrayLeft(runs, slots.get(job_id, 1)) for job_id, runs in sorted(left.items())}
    return parts, unknown


def share_parallel(
    members: Sequence[Member], starting: Sequence[Member], parallel: int, slots: int
) -> tuple[dict[str, int | FlowjobsError], int]:
    """Have arrays that wait or run, and those to come, train so many runs at a time together.

    Args:
        members: The runs of the sweep.
        starting: Those that will be submitted.
        parallel: How many are to run at a time; see `jobs_at_once`.
        slots: How many of those that will be submitted share a job.

    Returns:
        How many runs each array trains at a time from now on, by its id, or why it does not; and
        how many those that will be submitted may.
    """
    arrays, unknown = arrays_left(members)
    new = new_arrays(starting, parallel, slots)
    jobs = jobs_at_once([*arrays.values(), *new], parallel)
    changed: dict[str, int | FlowjobsError] = {}
    for (job_id, part), n in zip(arrays.items(), jobs[: len(arrays)], strict=True):
        try:
            if job_id in unknown:
                raise unknown[job_id]
            set_parallel(job_id, n)
        except FlowjobsError as error:  # the others are started all the same
            changed[job_id] = error
        else:
            changed[job_id] = n * part.slots
    # In jobs, as `tasks_of` divides them up again.
    return changed, min(parallel, slots * sum(jobs[len(arrays) :]))
