"""What only a job can find out: whether its node shares our folder, locks and Slurm."""

import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from flowjobs.from_json import from_json
from flowjobs.runs.file_lock import NoLocksError, try_lock
from flowjobs.runs.files import read_json, write_json
from flowjobs.slurm.client import controller_answers

if TYPE_CHECKING:
    from filelock import FileLock

# How long the node waits to be looked at: a network file system may show a new file late.
LOOK_S = 120.0
POLL_S = 0.2


@dataclass(frozen=True)
class NodeAnswer:
    """What a job on a node has found out.

    Attributes:
        host: The node.
        commands: Whether sbatch and scontrol work there.
        why: Whether, and why not.
        sees_our_lock: Whether it noticed a lock that this host held.
        we_see_its_lock: Whether this host noticed a lock that the node held.
    """

    host: str
    commands: bool
    why: str
    sees_our_lock: bool
    we_see_its_lock: bool = False

    @property
    def locks(self) -> bool:
        """Whether a lock holds in both directions."""
        return self.sees_our_lock and self.we_see_its_lock


@dataclass(frozen=True)
class NodeProbe:
    """The job: answers in `folder`, and holds a lock there until that was tried.

    Args:
        folder: The folder of the run that the job is submitted as.
    """

    folder: str

    def __call__(self) -> None:
        """Run the job."""
        if submitit.JobEnvironment().global_rank > 0:
            return
        folder = Path(self.folder)
        sees = _is_locked(_our_lock(folder))
        commands, why = controller_answers()
        answer = NodeAnswer(socket.gethostname(), bool(commands), why, sees)
        lock = _hold(_node_lock(folder))
        write_json(_answer_file(folder), asdict(answer))
        end = time.monotonic() + LOOK_S
        while not _looked_file(folder).exists() and time.monotonic() < end:
            time.sleep(POLL_S)
        _release(lock)


class NodeQuestion:
    """This host's side: holds a lock until the node has answered.

    Args:
        folder: The folder of the run that the probe is submitted as.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = _hold(_our_lock(folder))

    def answer(self) -> NodeAnswer | None:
        """The node's answer; None while there is none."""
        try:
            found = from_json(NodeAnswer, read_json(_answer_file(self._folder)))
        except FileNotFoundError:
            return None
        return replace(found, we_see_its_lock=_is_locked(_node_lock(self._folder)))

    def release(self) -> None:
        """Free the lock, and let the node go."""
        _looked_file(self._folder).touch()
        _release(self._lock)


def _hold(path: Path) -> "FileLock | None":
    try:
        return try_lock(path)
    except NoLocksError:
        return None  # the other side finds out


def _release(lock: "FileLock | None") -> None:
    if lock is not None:
        lock.release()


def _is_locked(path: Path) -> bool:
    try:
        lock = try_lock(path)
    except NoLocksError:
        return False
    _release(lock)
    return lock is None


def _our_lock(folder: Path) -> Path:
    return folder / "held-where-submitted.lock"


def _node_lock(folder: Path) -> Path:
    return folder / "held-on-node.lock"


def _answer_file(folder: Path) -> Path:
    return folder / "node.json"


def _looked_file(folder: Path) -> Path:
    return folder / "looked"
