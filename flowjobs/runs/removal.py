"""Removes a run from a study: its folder and its weights, whole or not at all."""

import os
import shutil
import uuid
from pathlib import Path

from flowjobs.errors import RunBusyError
from flowjobs.runs.lock import held_off, lock_holder
from flowjobs.runs.run import Run

REMOVED = ".removed-"


def size_of(run: Run) -> int:
    """What a run takes of the disk, in bytes."""
    return sum(
        file.lstat().st_size
        for folder in (run.folder, run.checkpoints)
        for file in folder.rglob("*")
        if not file.is_dir()
    )


def remove(run: Run) -> None:
    """Remove a run. Look first whether a job of it waits.

    Moved out of sight first: whoever is killed here leaves no half of a run, and the next call
    removes the rest. Writes nothing, so that it works on a full disk.

    Raises:
        RunBusyError: An attempt trains it.
        OSError: It cannot be removed.
    """
    away = run.study / f"{REMOVED}{run.name}-{uuid.uuid4().hex[:8]}"
    with held_off(run.folder):
        if holder := lock_holder(run.folder):
            raise RunBusyError(f"{run.name} is held by {holder}: cancel it first")
        os.rename(run.folder, away)
    _remove_weights(run.checkpoints, away)
    for rest in run.study.glob(f"{REMOVED}*"):
        shutil.rmtree(rest)


def _remove_weights(folder: Path, away: Path) -> None:
    if folder.is_symlink():
        # On scratch: what is there beside checkpoints is not ours.
        for file in folder.glob("*.pt"):
            file.unlink()
        target = Path(os.path.realpath(folder))
        folder.unlink()
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
    elif folder.exists():
        os.rename(folder, away / "checkpoints")
