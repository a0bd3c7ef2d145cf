"""Reading rows of a large file, so that a process holds no more of it than it asked for.

Pages of a mapped file count as the process's own until the kernel needs them elsewhere, up to the
whole file, and a scheduler that polls may end a job for them.
"""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowjobs.errors import DataError

# A smaller file may as well be mapped.
LARGE_BYTES = 64 * 1024**2


class RowReader:
    """Rows of a tensor in a file.

    Args:
        path: The file.
        offset: Where the tensor's first byte is in it.
        shape: (n, dim).
        dtype: Type of the numbers.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._path = path
        self._offset = offset
        (self._n, self._dim), self._dtype = shape, dtype
        self._row_bytes = shape[1] * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def rows(self, index: int | Sequence[int] | slice | Tensor) -> Tensor:
        """The rows that indexing the tensor with `index` gives, in that order.

        Raises:
            IndexError: There is no such row.
        """
        if isinstance(index, slice):
            places = np.arange(*index.indices(self._n))
        else:
            places = np.asarray(index)
        if places.ndim == 0:
            return self.rows([int(places)])[0]
        places = np.where(places < 0, places + self._n, places)
        if ((places < 0) | (places >= self._n)).any():
            raise IndexError(f"an index is out of range for {self._n} rows")
        rows = torch.empty((len(places), self._dim), dtype=self._dtype)
        if not len(places):
            return rows
        memory = memoryview(rows.view(torch.uint8).numpy().data).cast("B")
        # Rows that follow one another in the file are read at once.
        ends = [*(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        start = 0
        for end in ends:
            part = memory[start * self._row_bytes : end * self._row_bytes]
            self._read(part, self._offset + int(places[start]) * self._row_bytes)
            start = end
        return rows

    def _read(self, memory: memoryview, at: int) -> None:
        while memory:
            try:
                n = os.preadv(self._descriptor, [memory], at)
            except OSError as error:
                raise DataError(f"{self._path}, byte {at}: {error.strerror}") from error
            if n == 0:
                raise DataError(f"{self._path} ends at byte {at}: it was cut short")
            memory, at = memory[n:], at + n


def reader_of(path: Path, mapped: Tensor) -> RowReader | None:
    """A reader of the tensor that is mapped from `path`; None if it is small, or not row by row."""
    n_bytes = mapped.numel() * mapped.element_size()
    if n_bytes < LARGE_BYTES or not mapped.is_contiguous():
        return None
    offset = _offset_in_file(mapped.data_ptr(), n_bytes)
    if offset is None:
        return None
    return RowReader(path, offset, (mapped.shape[0], mapped.shape[1]), mapped.dtype)


def _offset_in_file(address: int, n_bytes: int) -> int | None:
    """Where the bytes at this address are in the file that they are mapped from."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not Linux
        return None
    for line in maps.read_text().splitlines():
        addresses, _, offset, _, inode, *_ = line.split()
        low, high = (int(end, 16) for end in addresses.split("-"))
        if low <= address and address + n_bytes <= high and inode != "0":
            return int(offset, 16) + address - low
    return None
