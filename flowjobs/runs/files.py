"""Writing a file whole or not at all. Knows nothing of what is in it."""

import errno
import functools
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

# Each file waits for the disk, or a file server; side by side they wait together.
FILES_AT_ONCE = 16
# A file server that fails over is away for so long.
AWAY_AT_MOST_S = 60.0
# What NFS, Lustre (108 as it evicts a client) and others say as their server is away or comes back.
FILE_SERVER_IS_AWAY = frozenset(
    getattr(errno, name)
    for name in (
        *("ESTALE", "ETIMEDOUT", "EREMOTEIO", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET"),
        *("ENETUNREACH", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENOTCONN", "ESHUTDOWN"),
        *("ECOMM", "ENOLINK", "ENODEV"),
    )
    if hasattr(errno, name)  # some are Linux's own
)


@contextmanager
def replaced_whole(path: Path, *, flush: bool = True, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a new file that takes `path`'s place when the block ends without an exception.

    The bytes are flushed to the disk before the rename and the folder after it, so that a power
    loss leaves the old file or the new one. The name is unique to the thread: two writers
    cannot mix their bytes.

    Args:
        path: The file to replace.
        flush: Wait for the disk. Without, the file is still replaced whole for every process,
            but a power loss may leave an empty one.
        mode: Who may read it, before the umask.
    """
    writer = f"{os.uname().nodename}-{os.getpid()}-{threading.get_native_id()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        # The mode from the first byte on: after a chmod it would have been readable for a moment.
        # And "+": a checkpoint is read back before it takes its name.
        with open(temporary, "w+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # of a write that failed, Python does not tell
        # A full disk must not keep the torn file as well.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if flush:
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make a rename in `folder` last over a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems cannot flush a folder; the rename itself has happened.
    finally:
        os.close(descriptor)


def write_json(
    path: Path, content: Mapping[str, Any], *, flush: bool = True, mode: int = 0o666
) -> None:
    """Replace `path` by `content` as JSON; see `replaced_whole` for `flush` and `mode`."""
    text = json.dumps(content, indent=2) + "\n"
    with replaced_whole(path, flush=flush, mode=mode) as file:
        file.write(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        OSError: It cannot be read; FileNotFoundError: there is none.
        ValueError: It holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"found {type(found).__name__}, expected an object")
    return found


def flush_files(paths: Iterable[Path]) -> None:
    """Return when files that are written are on the disk; many in the time of a few."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        list(threads.map(_flush, paths))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning once, however often this process meets it."""
    logger.warning("%s", text)


def append_line(path: Path, line: str) -> None:
    """Add one line in one write, so that lines of several processes do not mix.

    Raises:
        OSError: It is not there whole; what is there of it damages no other line.
    """
    # O_APPEND: the end of the file is looked up in the same step as the write.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (("\n" if torn else "") + line + "\n").encode()
        # On a nearly full disk a write is short without an error: the next one says why.
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)
