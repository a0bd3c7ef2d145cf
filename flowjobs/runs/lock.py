"""One writer: the lock that an attempt holds on its run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from flowjobs.errors import RunBusyError
from flowjobs.runs.files import write_json
from flowjobs.runs.status import JobInfo


@contextmanager
def run_lock(folder: Path, holder: JobInfo) -> Iterator[None]:
    """Hold the run in `folder` for the length of the block.

    The operating system frees the lock when its process dies, however it dies.

    Raises:
        RunBusyError: Another attempt holds it; the text says which.
    """
    from filelock import FileLock, Timeout  # slow to load, and --help does without

    lock = FileLock(folder / ".lock")
    holder_file = folder / ".lock-holder.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunBusyError(
            f"the run in {folder} is being trained by {_describe(holder_file)}: "
            "wait for it, or cancel it first"
        ) from None
    try:
        write_json(holder_file, asdict(holder))
        yield
    finally:
        lock.release()


def lock_holder(folder: Path) -> str | None:
    """Who holds the run in `folder`, in words for a person; None if nobody does."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=0):
            return None
    except Timeout:
        return _describe(folder / ".lock-holder.json")


def _describe(holder_file: Path) -> str:
    try:
        found = json.loads(holder_file.read_text())
        return (
            f"{found['cluster']} job {found['job_id']} on {found['host']} (process {found['pid']})"
        )
    except (OSError, ValueError, KeyError):
        return "another attempt"
