"""Identify a process of this host even after its pid was reused.

Ids come again after a reboot, and in a container the first process has the same one each time.
"""

import contextlib
import os
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def process_mark(pid: int) -> str | None:
    """When a process was started, counted from which boot: no other one of its id has the same.

    By the kernel's own count, which no change of the clock moves. None if it is not there, or
    where there is no /proc.
    """
    try:
        return f"{BOOT_ID.read_text().strip()}:{_fields_of(pid)[19]}"
    except (OSError, IndexError):
        return None


def process_lives(pid: int, mark: str | None = None) -> bool:
    """Whether a process is there.

    Args:
        pid: Its id on this host.
        mark: Its `process_mark`, if that was noted: else any process of the id is taken for it.
    """
    try:
        with contextlib.suppress(PermissionError):  # another user's
            os.kill(pid, 0)
        # One that has ended stays until its parent asks how.
        state = _fields_of(pid)[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X") and (mark is None or process_mark(pid) in (None, mark))


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal; False where that is unknown."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("SigIgn:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def parent_of(pid: int) -> int:
    """The process that has started another one, or has adopted it.

    Raises:
        OSError: There is no such process, or where there is no /proc.
    """
    return int(_fields_of(pid)[1])


def _fields_of(pid: int) -> list[str]:
    """What the kernel says of a process after its name, which may hold anything: its state first,
    its start as the 20th."""
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return stat.rpartition(")")[2].split()
