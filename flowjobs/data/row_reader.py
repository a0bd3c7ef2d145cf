"""Reading rows of a large file, so that a process holds no more of it than it asked for.

Not through a mapping: its pages count as the process's own until the kernel needs them elsewhere,
up to the whole file, and a scheduler that polls may end a job for them; and where the file is cut
short, a process that touches what is gone dies of a signal.
"""

import itertools
import math
import os
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowjobs.data.read_ahead import read_in_time
from flowjobs.errors import DataError
from flowjobs.runs.data_file import DataContent, Layout, content_of

# At most so much is read at once, and so often before the wait begins anew: a large read of a slow
# file system may take longer than one that hangs is waited for.
PIECE_BYTES = 1024**2
PIECES_AT_ONCE = 256


class RowReader:
    """Rows of an array in a file, as long as it is the file that was opened.

    Args:
        path: The file.
        layout: Where its numbers are; of shape (n, *shape), row after row.

    Attributes:
        shape: (n, *shape).
        dtype: Type of the numbers.
        content: What the rows are.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        self._layout = layout
        self.shape = layout.shape
        self._n = layout.shape[0]
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        self._row_bytes = math.prod(layout.shape[1:]) * self.dtype.itemsize
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._version = self._version_of_file()
        self.content = read_in_time(self._content, str(path))

    def rows(self, index: int | Sequence[int] | slice | Tensor) -> Tensor:
        """The rows that indexing the tensor with `index` gives, in that order.

        Raises:
            IndexError: There is no such row.
            DataError: The file is not what it was when it was opened, or does not answer.
        """
        if isinstance(index, slice):
            places = np.arange(*index.indices(self._n))
        else:
            places = np.asarray(index)
        if places.dtype == bool:
            if places.shape != (self._n,):
                raise IndexError(f"a mask of shape {places.shape} is none of {self._n} rows")
            places = np.flatnonzero(places)
        if places.ndim == 0:
            return self.rows([int(places)])[0]
        places = np.where(places < 0, places + self._n, places)
        if ((places < 0) | (places >= self._n)).any():
            raise IndexError(f"an index is out of range for {self._n} rows")
        rows = torch.empty((len(places), *self.shape[1:]), dtype=self.dtype, device="cpu")
        if not len(places):
            return rows
        memory = memoryview(rows.view(torch.uint8).numpy().data).cast("B")
        # Rows that follow one another in the file are read at once.
        ends_piece = np.diff(places) != 1
        most = max(1, PIECE_BYTES // self._row_bytes)
        ends_piece[most - 1 :: most] = True
        bounds = [0, *(np.flatnonzero(ends_piece) + 1).tolist(), len(places)]
        for first in range(0, len(bounds) - 1, PIECES_AT_ONCE):
            some = bounds[first : first + PIECES_AT_ONCE + 1]
            read_in_time(partial(self._read_pieces, memory, places, some), str(self._path))
        return rows

    def _read_pieces(
        self, memory: memoryview, places: np.ndarray[Any, Any], bounds: list[int]
    ) -> None:
        """Read rows `places[start:end]` into their part of the memory, of each two bounds."""
        for start, end in itertools.pairwise(bounds):
            part = memory[start * self._row_bytes : end * self._row_bytes]
            self._read(part, int(places[start]) * self._row_bytes)
        self._check_unchanged()

    def _read(self, memory: memoryview, at: int) -> None:
        at += self._layout.offset
        while memory:
            try:
                n = os.preadv(self._descriptor, [memory], at)
            except OSError as error:
                raise DataError(f"{self._path}, byte {at}: {error.strerror}") from error
            if n == 0:
                raise DataError(f"{self._path} ends at byte {at}: it was cut short")
            memory, at = memory[n:], at + n

    def _content(self) -> DataContent:
        def read(start: int, size: int) -> bytearray:
            block = bytearray(size)
            self._read(memoryview(block), start)
            return block

        layout = self._layout
        return content_of(layout.shape, layout.dtype, layout.n_bytes, read)

    def _version_of_file(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def _check_unchanged(self) -> None:
        version = self._version_of_file()
        if version == self._version:
            return
        if self._content() != self.content:
            raise DataError(
                f"{self._path} has changed while it was trained on: restore it, or give the run "
                "on the new data another --name"
            )
        self._version = version  # it was only touched
