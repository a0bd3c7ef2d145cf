"""Submits many runs as Slurm arrays: one for each set of resources, more where one is too large."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flowjobs import slurm
from flowjobs.errors import SubmissionError, SubmissionUnknownError
from flowjobs.jobs.array import new_array
from flowjobs.jobs.entry import ArrayTask
from flowjobs.jobs.snapshot import CodePlan, carry_out_together
from flowjobs.jobs.submit import submit_array, told_to_end_waits
from flowjobs.runs.files import flush_files
from flowjobs.runs.run import Before, Run
from flowjobs.sweeps.plan import Member, resource_sets

# What sbatch says where fewer jobs, or a shorter array, would have been taken. The policy's text is
# the same for a time limit that is too long: that one is refused for a single task as well.
TOO_MANY = re.compile(
    "submit limit|temporarily unable to accept|array specification|job count", re.IGNORECASE
)
# The default of MaxArraySize, where the cluster does not say: tasks 0 to 1000.
ARRAY_SIZE = 1001


@dataclass
class Submitted:
    """What came of a submission.

    Attributes:
        jobs: The arrays, by id, and how many tasks each has.
        left: Runs that the cluster does not take now.
        why: What it said.
        notes: What a person should know of the runs.
    """

    jobs: dict[str, int] = field(default_factory=dict)
    left: list[Member] = field(default_factory=list)
    why: str = ""
    notes: list[str] = field(default_factory=list)


def submit_arrays(
    members: Sequence[Member], code: Sequence[CodePlan], name: str, parallel: int | None
) -> Submitted:
    """Make the runs and submit them, as few arrays.

    The caller is the only one who does that in the study; see `jobs.array.submitting`.

    Args:
        members: The runs to start; at least one.
        code: What code each of them keeps.
        name: The arrays' name in the queue.
        parallel: How many run at a time.

    Raises:
        SubmissionError: Nothing was submitted: the runs are as they were.
        SubmissionUnknownError: Whether an array was taken is unknown.
    """
    code_of = dict(zip((member.run for member in members), code, strict=True))
    done = Submitted()
    largest = _largest_array()
    for of_set in resource_sets(members):
        waiting = list(of_set)
        size = min(largest, len(waiting))
        while waiting and size:
            chunk = waiting[:size]
            share = None if parallel is None else max(1, parallel * len(chunk) // len(members))
            try:
                job_id = _submit_one(chunk, code_of, name, share, done)
            except SubmissionUnknownError:
                raise
            except SubmissionError as error:
                if not (TOO_MANY.search(str(error)) and (size > 1 or done.jobs)):
                    raise
                done.why = str(error)
                size //= 2  # what there is room for is not told: it is found by halving
                continue
            done.jobs[job_id] = len(chunk)
            waiting = waiting[size:]
            size = min(size, len(waiting))
        done.left += waiting
    return done


def _largest_array() -> int:
    said = slurm.settings().get("MaxArraySize", "")
    return max(1, int(said) if said.isdigit() else ARRAY_SIZE)


def _submit_one(
    members: Sequence[Member],
    code_of: dict[Run, CodePlan],
    name: str,
    parallel: int | None,
    done: Submitted,
) -> str:
    """Submit one array. Returns its id."""
    runs = [member.run for member in members]
    array = new_array(runs[0].study)
    with told_to_end_waits(), _put_back_if_refused(runs):
        notes = make_runs(members, [code_of[run] for run in runs])
        task = ArrayTask(str(array.folder))
        job_id = submit_array(array, runs, name, task, members[0].config.slurm, parallel)
    done.notes += notes
    return job_id


@contextlib.contextmanager
def _put_back_if_refused(runs: Sequence[Run]) -> Iterator[None]:
    before: list[Before] = [run.before_submission() for run in runs]
    try:
        yield
    except SubmissionUnknownError:
        raise  # a task of theirs may start
    except BaseException:
        for each in before:
            with contextlib.suppress(OSError):  # why it failed is what a person must hear
                each.put_back()
        raise


def make_runs(members: Sequence[Member], code: Sequence[CodePlan]) -> list[str]:
    """Make the folders of runs that are to be started, or bring them up to date.

    Returns:
        What a person should know.
    """
    notes = []
    files = []
    for member in members:
        run = member.run
        if note := run.create(member.config, flush=False):
            notes.append(note)
        files += [run.config_file, run.folder / "run.json"]
        run.clear_cancel()
    files += carry_out_together(code)
    flush_files(files)
    return notes


def set_parallel(members: Sequence[Member], parallel: int) -> list[str]:
    """Have the arrays that still wait or run take so many tasks at a time. Returns their ids."""
    arrays = {
        entry["job_id"].partition("_")[0]
        for member in members
        if member.stage in ("waiting", "running")
        for entry in member.run.submissions()[-1:]
        if "array" in entry
    }
    for job_id in sorted(arrays):
        slurm.set_parallel(job_id, max(1, parallel // len(arrays)))
    return sorted(arrays)
