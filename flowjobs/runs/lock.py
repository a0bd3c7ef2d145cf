"""One writer: the lock that an attempt holds on its run, and how a dead holder loses it.

Two things make the lock. The operating system's lock on `.lock` is freed when its process dies,
however it dies. `.lock-holder.json` names the attempt that holds the run: where the system's lock
cannot be trusted (a process that lives on beside its rerun, a file system that knows no locks, or
none between nodes), the scheduler's word on that attempt's job decides, and of one that is no job
of a scheduler whether it still writes. Whoever is not named there any more has lost the run and
must write nothing.
"""

import contextlib
import errno
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowjobs.errors import RunBusyError, RunHolderUnknownError, RunTakenOverError
from flowjobs.from_json import from_json
from flowjobs.runs.file_lock import SAY_AFTER_S, NoLocksError, locked, try_lock
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.metrics import METRICS_FILE
from flowjobs.runs.process import process_lives
from flowjobs.runs.run_id import is_same_folder
from flowjobs.runs.status import JobInfo, same_host

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger(__name__)

# What is known of the holder of a run: "leaving" is a process that has been told to end.
Verdict = Literal["gone", "alive", "leaving", "unknown"]
# Asked with the holder and whether the system's lock is free; None where there are no locks.
Judge = Callable[[JobInfo, bool | None], Verdict]

# Longer than Slurm waits, by default, between telling a job to end and killing it (KillWait).
LEAVING_WAIT_S = 90.0
# Whoever looks whether the run is held (`status`) holds it for an instant.
GLANCE_S = 1.0
GATE_WAIT_S = 60.0
# Who has written within this time lives, whatever the lock looks like. Shorter than the wait above.
QUIET_S = 60.0
POLL_S = 0.25
# Another's run, or a read-only disk: whether it is locked cannot be seen.
NOT_OURS_TO_LOCK = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


# The `cluster` of a holder that does not train: it writes down how a dead attempt ended.
RECONCILE = "reconcile"


def system_lock_decides(holder: JobInfo, lock_is_free: bool | None) -> Verdict:
    """The judge where there is no scheduler: a process that died has freed its lock.

    Where there are no locks, a process of this host can still be looked for.
    """
    if lock_is_free is None:
        if not same_host(holder.host, socket.gethostname()):
            return "unknown"
        lock_is_free = not process_lives(holder.pid, holder.process)
    if lock_is_free:
        return "gone"
    return "leaving" if holder.cluster == RECONCILE else "alive"


class RunLock:
    """Holds the run in `folder` for the length of a `with` block.

    Args:
        folder: The run's folder.
        job: The attempt that wants it.
        judge: Says whether the attempt that is named as its holder still lives.

    Raises:
        RunBusyError: On entering: another attempt holds it; the text says which.
        RunHolderUnknownError: On entering: one has not ended in time, or may not have ended.
    """

    def __init__(self, folder: Path, job: JobInfo, judge: Judge = system_lock_decides) -> None:
        self._folder = folder
        self._job = job
        self._judge = judge
        self._token = uuid.uuid4().hex
        self._lock: FileLock | None = None

    def __enter__(self) -> "RunLock":
        started = time.monotonic()
        said = False
        while (verdict := self._try()) != "gone":
            waited_s = time.monotonic() - started
            holder = _describe(_read_holder(self._folder))
            if verdict == "alive" and waited_s > GLANCE_S:
                raise RunBusyError(
                    f"the run in {self._folder} is being trained by {holder}: wait for it, or "
                    "cancel it first"
                )
            if waited_s > LEAVING_WAIT_S:
                state = "has not ended yet" if verdict == "leaving" else "may not have ended"
                raise RunHolderUnknownError(
                    f"waited {waited_s:.0f} s for {holder}, which {state}; nothing was done. The "
                    "same command resumes the run once it has; if you know that it has, delete "
                    f"{_holder_file(self._folder)}"
                )
            if waited_s > SAY_AFTER_S and not said:
                logger.warning("waiting for %s, up to %.0f s", holder, LEAVING_WAIT_S)
                said = True
            time.sleep(POLL_S)
        return self

    def __exit__(self, *error: object) -> None:
        # Without the gate, which others may hold for as long as they ask Slurm: a preempted job has
        # no time for that. Who takes the run over between these lines loses its name, and stops at
        # its next `check_held` having harmed nothing.
        if self.is_held():
            _holder_file(self._folder).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()

    def is_held(self) -> bool:
        """Whether this attempt is still the one that holds the run."""
        try:
            found = _read_holder(self._folder)
        except OSError:
            return True  # a file system that is away for a moment has not given the run away
        return found is not None and found.get("token") == self._token

    def check_held(self) -> None:
        """Raise a RunTakenOverError if another attempt has taken the run over."""
        if not self.is_held():
            if not self._folder.exists():
                raise RunTakenOverError(
                    f"{self._folder} is gone, moved or deleted; this attempt writes nothing more: "
                    "submit the run again from where it is now"
                )
            raise RunTakenOverError(
                f"the run in {self._folder} was taken over by "
                f"{_describe(_read_holder(self._folder))}; this attempt writes nothing more"
            )

    def _try(self) -> Verdict:
        """Take the lock if its holder is gone; the answer says what is known of the holder."""
        file = self._folder / ".lock"
        # To look and to take are two steps: two attempts could both find the holder gone.
        with held_off(self._folder):
            lock, free = _look_at_lock(file)
            verdict = self._judge_holder(free)
            if verdict != "gone":
                if lock is not None:
                    lock.release()
                return verdict
            if free is False:
                # Held by a process that does not count any more. A new file is a new lock.
                file.unlink()
                lock = try_lock(file)
            own = {"token": self._token, "folder": os.path.realpath(self._folder)}
            # Last: a kill before this leaves a lock that names nobody and ends with its process.
            write_json(_holder_file(self._folder), {**asdict(self._job), **own})
            self._lock = lock
        return "gone"

    def _judge_holder(self, free: bool | None) -> Verdict:
        found = _read_holder(self._folder)
        if found is None:
            # Nobody is named, but the lock is taken: by one who leaves, or who only looks.
            return "leaving" if free is False else "gone"
        return _judged(self._folder, found, free, self._judge)


def held_off(folder: Path) -> AbstractContextManager[None]:
    """Keeps others from taking the run in `folder`: they do so one after another."""
    return locked(folder / ".lock-gate", GATE_WAIT_S, f"to take {folder.name}")


def lock_holder(folder: Path, judge: Judge = system_lock_decides) -> str | None:
    """Who holds the run in `folder`, or may hold it, as text; None if nobody does."""
    found = _read_holder(folder)
    if found is None:
        return None
    try:
        lock, free = _look_at_lock(folder / ".lock")
    except OSError as error:
        if error.errno not in NOT_OURS_TO_LOCK:
            raise
        lock, free = None, None
    if lock is not None:
        lock.release()
    return None if _judged(folder, found, free, judge) == "gone" else _describe(found)


def _look_at_lock(file: Path) -> "tuple[FileLock | None, bool | None]":
    """The lock, if it was free, and whether it was; None where there are no locks."""
    try:
        lock = try_lock(file)
    except NoLocksError:
        return None, None
    return lock, lock is not None


def _judged(folder: Path, found: dict[str, Any], free: bool | None, judge: Judge) -> Verdict:
    try:
        holder = from_json(JobInfo, found)
    except ValueError:  # written by another version
        if free is None:
            return "unknown"
        return "gone" if free else "alive"
    # Slurm answers for its jobs. Some file systems have locks, but none between nodes.
    elsewhere = holder.cluster != "slurm" and not same_host(holder.host, socket.gethostname())
    if free and elsewhere and written_lately(folder, QUIET_S):
        free = None
    return judge(holder, free)


def written_lately(folder: Path, within_s: float) -> bool:
    """Whether an attempt has written to the run in `folder` within this time."""
    written = 0.0
    for name in ("status.json", METRICS_FILE):
        with contextlib.suppress(FileNotFoundError):
            written = max(written, (folder / name).stat().st_mtime)
    return time.time() - written < within_s


def _holder_file(folder: Path) -> Path:
    return folder / ".lock-holder.json"


def _read_holder(folder: Path) -> dict[str, Any] | None:
    try:
        found = read_json(_holder_file(folder))
    except (FileNotFoundError, ValueError):
        return None
    # A copy of a run that is trained: its holder holds the original.
    return None if _is_elsewhere(str(found.get("folder", folder)), folder) else found


def _is_elsewhere(recorded: str, folder: Path) -> bool:
    # Where nothing is there any more, it was moved.
    return os.path.exists(recorded) and not is_same_folder(recorded, folder)


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another attempt"
    try:
        job = from_json(JobInfo, holder)
    except ValueError:  # written by another version
        return "another attempt"
    return job.description if job.cluster == "none" else f"{job.description} (process {job.pid})"
