"""`metrics.jsonl`: one row a logged step, the record that W&B mirrors."""

import itertools
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowjobs.runs.files import replaced_whole

logger = logging.getLogger(__name__)

Row = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
# Enough for the last few dozen rows.
TAIL_BYTES = 8192


class MetricsFile:
    """Appends rows to `metrics.jsonl`, each step at most once.

    A row is one write to a file opened for appending: it outlives the process from then on,
    whatever kills it, without a flush to the disk for every row. Rows that a full disk does not
    take wait in memory and come later, in order.

    Args:
        path: The file; it is made where it does not exist.
        after_step: Rows past this step are dropped first: an earlier attempt wrote them after
            the checkpoint that this one resumes from. On the same hardware they come again with
            the same values; until they have, they are kept in `metrics.lost.jsonl` to tell.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        self._lost_file = path.with_suffix(".lost.jsonl")
        self._last_step, self._lost = _rewrite_up_to(path, after_step, self._lost_file)
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        self._warned = False
        # Rows come from the training, `flush` from the thread that saves.
        self._lock = threading.Lock()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it must have a `step` past the last one's."""
        self._last_step = row["step"]
        with self._lock:
            self._waiting += (json.dumps(row) + "\n").encode()
            try:
                self._write_waiting()
            except OSError as error:
                if not self._warned:
                    logger.warning("%s: %s; its rows wait in memory", self._path, error.strerror)
                self._warned = True

    def notice_other_values(self, row: Mapping[str, Any]) -> int | None:
        """Compare a row, before it is written, with the lost one of its step.

        Returns:
            None if they are the same; else (another type of GPU? changed code?) the last step that
            was, or 0. Once that is on record: `forget_lost`.
        """
        if not self._lost:
            return None
        if self._lost.pop(row["step"], row) == row:
            if not self._lost:
                self.forget_lost()
            return None
        logger.warning(
            "step %d was repeated with other values than before its work was lost (another type of "
            "GPU? changed code?); %s has the ones that count",
            row["step"],
            self._path,
        )
        return self._last_step

    def forget_lost(self) -> None:
        """Compare no more with what was lost, in later attempts neither."""
        self._lost.clear()
        with suppress(OSError):  # it goes with the next attempt
            self._lost_file.unlink(missing_ok=True)

    def flush(self) -> None:
        """Return when every row is on the disk.

        Raises:
            OSError: Some are not.
        """
        with self._lock:
            self._write_waiting()
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            try:
                self._write_waiting()
            except OSError as error:
                logger.warning("%s: %s; its last rows are lost", self._path, error.strerror)
            os.close(self._descriptor)

    def _write_waiting(self) -> None:
        while self._waiting:
            # A disk that is nearly full takes a part of a row; the rest must follow it.
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        self._warned = False


class MetricsReader:
    """Reads a metrics file that is being written, each row once.

    Args:
        path: The file; what replaces it later is not seen.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def new_rows(self) -> list[Row]:
        """The rows since the last call; a line that is not whole yet comes with the next."""
        start = self._file.tell()
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        self._file.seek(start + whole)
        return list(_rows_of(text[:whole]))

    def written_at(self) -> float:
        """When the newest row was written, in seconds of the epoch."""
        return os.fstat(self._file.fileno()).st_mtime


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a metrics file, in order, without a torn last line; none if it is absent."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    yield from _rows_of(text)


def best_step(path: Path) -> int | None:
    """The step of the best validation loss so far, of which best.pt is once it is saved.

    None where the rows do not say: there are none, or a best.pt that was lost was made anew.
    """
    best, step, said = math.inf, None, None
    for row in _rows_of_epochs(path):
        loss, said = row.get("val/loss"), row.get("val/best_loss")
        if isinstance(loss, int | float) and loss < best:
            best, step = loss, row["step"]
    return step if best == said else None


def epochs_without_improvement(path: Path) -> int:
    """How many epochs ago the best validation loss was found, as far as the rows say; else 0."""
    best = [row.get("val/best_loss") for row in _rows_of_epochs(path)]
    since = itertools.takewhile(lambda loss: loss == best[-1], reversed(best))
    return max(len(list(since)) - 1, 0)


def _rows_of_epochs(path: Path) -> Iterator[Row]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    # A row of an epoch has the word; there are far more of others.
    lines = (line for line in text.splitlines(keepends=True) if b"val/best_" in line)
    yield from _rows_of(b"".join(lines))


def _rows_of(text: bytes) -> Iterator[Row]:
    # What follows the last newline is a line that is being written, or was when a kill came.
    for line in text.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill in the middle of a write, and written again since
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _rewrite_up_to(path: Path, step: int, lost_file: Path) -> tuple[int, dict[int, Row]]:
    """Drop the rows past a step. Returns the last step that is left, and what is lost, by step."""
    # Always a new file: an attempt that has lost the run and does not know yet still has the old
    # one open, and what it appends there harms nobody.
    rows = list(read_rows(path))
    kept = [row for row in rows if row["step"] <= step]
    # What attempts before the last one lost was told first, and may not have come again yet.
    lost = {row["step"]: row for row in [*rows, *read_rows(lost_file)] if row["step"] > step}
    if lost:
        _write_rows(lost_file, lost.values())
    else:
        lost_file.unlink(missing_ok=True)
    _write_rows(path, kept)
    return kept[-1]["step"] if kept else 0, lost


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with replaced_whole(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def latest_values(path: Path) -> Row:
    """The newest value of each key in the last rows of a metrics file; cheap to ask often."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return {}
    latest: Row = {}
    for row in _rows_of(tail):
        latest |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    return latest
