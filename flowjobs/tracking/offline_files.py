"""W&B's offline files: reading, mending and closing the record of one session of a run.

`RUN/wandb/offline-run-TIME-ID/run-ID.wandb` is LevelDB's log format (leveldb's doc/log_format.md)
behind a header of 7 bytes: blocks of 32 KiB, filled with chunks of crc32 (u32), length (u16), type
(u8) and data, where the crc is over type and data. A record is a whole chunk or several, and a
`wandb_internal_pb2.Record`. A kill may tear the last record; a reader skips what is damaged and
goes on at the next block.

Whoever changes a file here holds the run's lock, so that nothing else writes it. Says nothing of
what a run's outcome should be, and nothing of servers.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flowjobs.runs.files import replaced_whole
from flowjobs.runs.status import EXIT_PREEMPTED

FILE_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK_BYTES = 32 * 1024
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

# Numbers of the fields of wandb_internal.proto's Record.
HISTORY, RUN, EXIT = 2, 17, 18
CONTROL, UUID, INFO = 16, 19, 200
WIRE_VARINT, WIRE_MESSAGE = 0, 2


def session_files(run_folder: Path, run_id: str = "*") -> list[Path]:
    """The offline files of a run, oldest session first; with an id only those of that one."""
    # The folder's name begins with the time of its start.
    return sorted(run_folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))


def leave_to_the_original(run_folder: Path, run_id: str) -> None:
    """Keep a plain `wandb sync` from the files that a copied folder has of another run.

    Args:
        run_folder: The folder of the copy.
        run_id: Its own id.
    """
    for path in run_folder.glob("wandb/*run-*/run-*.wandb"):
        if path.name != f"run-{run_id}.wandb":
            path.with_name(f"{path.name}.synced").touch()


def record_of(content: bytes = b"") -> Any:
    """A `wandb_internal_pb2.Record`. Loads wandb."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    return Record.FromString(content)


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file that are whole, in order. Loads wandb."""
    for content in _whole(path.read_bytes()):
        yield record_of(content)


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Replace `path` by a file of these records, numbered anew from 1."""
    contents = []
    for number, record in enumerate(records, start=1):
        record.num = number
        contents.append(record.SerializeToString())
    _rewrite(path, contents)


def last_step_on_record(run_folder: Path, run_id: str = "*") -> int:
    """The highest step in the history of a run's offline files; -1 if there is none."""
    return max((_last_step(path) for path in session_files(run_folder, run_id)), default=-1)


def is_closed(path: Path) -> bool:
    """Whether the session said, or was made to say, how it ended. Loads no wandb."""
    tail, _ = _tail(path, blocks=2)
    return bool(tail) and _kind(tail[-1]) == EXIT


def is_header_only(path: Path) -> bool:
    """Whether the session was killed before it said which run it is of. Loads no wandb."""
    return not any(_kind(content) == RUN for content in _scan(path.read_bytes()) if content)


def append_preempted(path: Path) -> None:
    """Say of a session whose process is gone that its run waits; a closed one is left as it is.

    What is not whole in the file goes. The caller holds the run's lock.

    Raises:
        ValueError: The file `is_header_only`: there is no run in it to end.
    """
    if is_closed(path):
        return
    contents = _whole(path.read_bytes())
    runs = [content for content in contents if _kind(content) == RUN]
    if not runs:
        raise ValueError(f"{path} names no run: it was cut before its first record")
    number = record_of(contents[-1]).num
    ending = [record_of(), record_of()]
    ending[0].preempting.SetInParent()
    ending[1].exit.exit_code = EXIT_PREEMPTED
    for record in ending:
        number = record.num = number + 1
    _rewrite(path, [*contents, *(record.SerializeToString() for record in ending)])


def _last_step(path: Path) -> int:
    """Read from the end: steps only grow in a file, and it may be large."""
    blocks = 2
    while True:
        tail, is_all = _tail(path, blocks)
        rows = [content for content in tail if _kind(content) == HISTORY]
        if rows:
            return int(record_of(rows[-1]).history.step.num)
        if is_all:
            return -1
        blocks *= 4


def _tail(path: Path, blocks: int) -> tuple[list[bytes], bool]:
    """The whole records that begin in the file's last blocks, and whether these are all blocks."""
    with path.open("rb") as file:
        start = max(0, path.stat().st_size // BLOCK_BYTES + 1 - blocks) * BLOCK_BYTES
        file.seek(start)
        log = file.read()
    return _whole(log, 0 if start else len(FILE_HEADER)), start == 0


def _whole(log: bytes, at: int = len(FILE_HEADER)) -> list[bytes]:
    return [content for content in _scan(log, at) if content is not None]


def _scan(log: bytes, at: int = len(FILE_HEADER)) -> Iterator[bytes | None]:
    """The records from `at` on; None stands for a stretch that is damaged."""
    parts: list[bytes] | None = None
    while at + CHUNK_HEADER.size <= len(log):
        room = BLOCK_BYTES - at % BLOCK_BYTES
        if room < CHUNK_HEADER.size:
            at += room
            continue
        crc, length, kind = CHUNK_HEADER.unpack_from(log, at)
        data = log[at + CHUNK_HEADER.size : at + CHUNK_HEADER.size + length]
        if length > room - CHUNK_HEADER.size or crc != _crc(kind, data):
            yield None
            # The length cannot be trusted: only the next block begins at a place that is known.
            parts, at = None, at + room
            continue
        at += CHUNK_HEADER.size + length
        begins, ends = kind in (FULL, FIRST), kind in (FULL, LAST)
        if begins == (parts is not None):
            yield None  # a record that has no end, or no beginning
        if begins:
            parts = []
        if parts is not None:
            parts.append(data)
            if ends:
                yield b"".join(parts)
                parts = None
    if parts is not None or at < len(log):
        yield None


def _rewrite(path: Path, contents: Iterable[bytes]) -> None:
    log = bytearray(FILE_HEADER)
    for content in contents:
        _append(log, content)
    with replaced_whole(path) as file:
        file.write(log)


def _append(log: bytearray, content: bytes) -> None:
    """Add a record to the bytes of a file, split where a block ends."""
    begins = True
    while begins or content:
        room = BLOCK_BYTES - len(log) % BLOCK_BYTES - CHUNK_HEADER.size
        if room < 0:
            log += bytes(room + CHUNK_HEADER.size)
            continue
        data, content = content[:room], content[room:]
        kind = (MIDDLE, LAST, FIRST, FULL)[2 * begins + (not content)]
        log += CHUNK_HEADER.pack(_crc(kind, data), len(data), kind) + data
        begins = False


def _crc(kind: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(bytes([kind])))


def _kind(content: bytes) -> int:
    """Which of Record's fields a record sets beside those that any may have, by its number."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == WIRE_VARINT:
            _, at = _varint(content, at)
        elif wire_type == WIRE_MESSAGE:
            if number not in (CONTROL, UUID, INFO):
                return number
            length, at = _varint(content, at)
            at += length
        else:
            break
    return -1


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The integer at `at`, seven bits a byte, and where it ends."""
    value = shift = 0
    while at < len(content):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, at
