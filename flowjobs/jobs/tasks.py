"""What the jobs of a run, of several that share one, and of an array do."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowjobs.jobs.array import array_at
from flowjobs.jobs.entry import RunTask
from flowjobs.jobs.packing import PackTask
from flowjobs.runs.pack import Pack
from flowjobs.runs.submittable import Submittable


@dataclass(frozen=True)
class ArrayTask:
    """What submitit pickles of an array, once for all its tasks.

    Args:
        folder: The array's, absolute.
    """

    folder: str

    def __call__(self) -> None:
        """Do what the job of a run does, or of a pack: of that which this task is."""
        array = array_at(Path(self.folder))
        task_of(array.submitted_as(os.environ["SLURM_ARRAY_TASK_ID"]))()


def task_of(submitted: Submittable) -> Callable[[], None]:
    """What a job of it does."""
    task = PackTask if isinstance(submitted, Pack) else RunTask
    return task(str(submitted.folder))
