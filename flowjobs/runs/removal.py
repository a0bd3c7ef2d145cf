"""Removes a run from a study: its folder and its weights, whole or not at all."""

import contextlib
import logging
import os
import shutil
import uuid
from pathlib import Path

from flowjobs.errors import RunBusyError
from flowjobs.runs.lock import held_off, lock_holder
from flowjobs.runs.run import REMOVED, Run, check_links

logger = logging.getLogger(__name__)


def size_of(run: Run) -> int:
    """What removing a run frees of the disk, in bytes."""
    folders = [run.checkpoints] if run.folder.is_symlink() else [run.folder, run.checkpoints]
    return sum(
        file.lstat().st_size
        for folder in folders
        for file in folder.rglob("*")
        if not file.is_dir()
    )


def remove(run: Run) -> None:
    """Remove a run. Look first whether a job of it waits.

    Of a record that is a link only that is removed, and said: it may be the run of another study.

    Moved out of sight first: whoever is killed here leaves no half of a run, and the next call
    removes the rest. Writes nothing, so that it works on a full disk.

    Raises:
        RunBusyError: An attempt trains it.
        ConfigError: Its record is behind a link that leads nowhere now, so that this is unknown.
        OSError: It cannot be removed.
    """
    check_links(run.folder)
    mark = f"{REMOVED}{run.name}-{uuid.uuid4().hex[:8]}"
    # Beside where they are: the weights, or the records, of a study may be on another file system.
    record, weights = run.folder.with_name(mark), run.checkpoints.with_name(mark)
    with held_off(run.folder):
        if holder := lock_holder(run.folder):
            raise RunBusyError(f"it is held by {holder}: cancel it first")
        # Weights first: without a record nothing would tell of them, and a new run of the name
        # would find them.
        with contextlib.suppress(FileNotFoundError):
            os.rename(run.checkpoints, weights)
        try:
            os.rename(run.folder, record)
        except BaseException:
            with contextlib.suppress(OSError):
                os.rename(weights, run.checkpoints)
            raise
    for rest in record.parent.glob(f"{REMOVED}*"):  # also that of a call that was killed
        if rest.is_symlink():
            there = os.path.realpath(rest)
            rest.unlink(missing_ok=True)
            link = rest.with_name(_name_of(rest))
            logger.warning("%s was a link: what is in %s is left", link, there)
        else:
            shutil.rmtree(rest, ignore_errors=True)
    for rest in weights.parent.glob(f"{REMOVED}*"):
        name = _name_of(rest)
        # Killed before it had moved the record: they are all that there is of a run.
        if name == run.name or not os.path.lexists(record.with_name(name)):
            _delete_weights(rest)
    for rest in (record, weights):
        if os.path.lexists(rest):
            logger.warning("%s is left of %s: the next rm tries again", rest, run.name)


def _name_of(moved: Path) -> str:
    return moved.name.removeprefix(REMOVED).rpartition("-")[0]


def _delete_weights(folder: Path) -> None:
    """Delete as much of a folder as can be: it may be another's, or be deleted by another now."""
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        # On scratch: what is there beside checkpoints is not ours.
        for file in folder.glob("*.pt"):
            file.unlink(missing_ok=True)
        target = Path(os.path.realpath(folder))
        folder.unlink()
        target.rmdir()  # if that was all
