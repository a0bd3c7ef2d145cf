"""Removes a run from a study: its folder and its weights, whole or not at all."""

import os
import shutil
import socket
import uuid
from pathlib import Path

from flowjobs.runs.lock import RECONCILE, RunLock
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo


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

    Moved out of the study's sight first: whoever is killed here leaves no half of a run.

    Raises:
        RunBusyError: An attempt trains it.
        OSError: It cannot be removed.
    """
    away = run.study / ".removed" / f"{run.name}-{uuid.uuid4().hex}"
    me = JobInfo(RECONCILE, str(os.getpid()), None, socket.gethostname(), os.getpid())
    with RunLock(run.folder, me):
        away.mkdir(parents=True)
        _remove_weights(run.checkpoints, away)
        os.rename(run.folder, away / "run")
    shutil.rmtree(away)
    if not any(away.parent.iterdir()):
        away.parent.rmdir()


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
