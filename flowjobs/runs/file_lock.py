"""A lock on a file between processes: never waited for without end, nor for long in silence.

On some file systems there is none: Lustre or BeeGFS mounted without flock, NFS without its lock
daemon. filelock's own way out there is a file that outlives a process that is killed.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flowjobs.errors import LockHeldError

if TYPE_CHECKING:
    from filelock import BaseFileLock, FileLock

logger = logging.getLogger(__name__)

NO_LOCKS_HERE = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
SAY_AFTER_S = 3.0
SAY_AGAIN_AFTER_S = 60.0
# Where there are no locks a holder renews its claim; one that is dead for so long has lost it.
LEASE_S = 20.0


class NoLocksError(Exception):
    """The file system knows no locks: whether a file is locked is unknown."""


def try_lock(path: Path) -> "FileLock | None":
    """The lock, held; None if another process holds it.

    Raises:
        NoLocksError: The file system knows no locks.
    """
    from filelock import FileLock, Timeout  # slow to load, and --help does without

    lock = FileLock(path, fallback_to_soft=False)
    try:
        _acquire(lock, 0)
    except Timeout:
        return None
    return lock


@contextmanager
def locked(
    path: Path, wait_s: float, purpose: str, look: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Hold the lock of a file while the block lasts.

    Where there are no locks it is held by a file beside it that is renewed as long as this process
    lives: enough to take turns, not to be certain that no two ever overlap.

    Args:
        path: The file.
        wait_s: How long to wait for whoever holds it.
        purpose: What for, as in "to write the config of mlp-icfm".
        look: Called every few seconds of the wait; what it raises ends it. True where the holder is
            seen to get on with its work: `wait_s` is counted anew.

    Raises:
        LockHeldError: It is still held.
    """
    from filelock import FileLock, SoftFileLease, Timeout

    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    deadline = time.monotonic() + wait_s
    say_at = 0.0
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        try:
            _acquire(lock, min(SAY_AFTER_S, left_s))
            break
        except NoLocksError:
            lock = SoftFileLease(path.with_name(f"{path.name}-lease"), lease_duration=LEASE_S)
        except Timeout:
            if look():
                deadline = time.monotonic() + wait_s
            if time.monotonic() >= deadline:
                raise LockHeldError(
                    f"waited {wait_s:g} s {purpose}: {path} is held by {_holder(path)}; "
                    "try again, or end that process if it hangs"
                ) from None
            if time.monotonic() >= say_at:
                logger.warning("waiting %s: %s is held by %s", purpose, path.name, _holder(path))
                say_at = time.monotonic() + SAY_AGAIN_AFTER_S
    try:
        # Into the locked file itself: a new one under its name would be a new lock.
        with suppress(OSError):  # for those who wait; a full disk is no reason not to hold it
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def _acquire(lock: "BaseFileLock", wait_s: float) -> None:
    try:
        lock.acquire(timeout=wait_s)
    except OSError as error:
        if error.errno in NO_LOCKS_HERE:
            raise NoLocksError(str(error)) from error
        raise


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip() or "another process"
    return "another process"
