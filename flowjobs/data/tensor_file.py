"""Writing a tensor that is larger than memory as a `.pt` file."""

import math
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from flowjobs.errors import DataError
from flowjobs.runs.data_file import start_of_entry
from flowjobs.runs.files import replaced_whole

# The zip format, which `.pt` files have.
CENTRAL_HEADER_BYTES = 46
CENTRAL_CRC_AT = 16
DESCRIPTOR_CRC_AT = 4


def write_tensor(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, rows: Iterable[Tensor]
) -> None:
    """Write what torch.save would of a tensor that comes some rows at a time.

    Args:
        path: The file, replaced whole.
        shape: (n, *shape).
        dtype: Type of the numbers.
        rows: In order, (m, *shape) at a time, n in all.
    """
    with replaced_whole(path) as out:
        # torch.save lays the file out and leaves the tensor's bytes to be filled in; the tensor is
        # a hole in a file, so that it takes no memory.
        with (
            tempfile.NamedTemporaryFile(dir=path.parent) as hole,
            torch.serialization.skip_data(),
        ):
            n = math.prod(shape)
            try:
                flat = torch.from_file(hole.name, shared=True, size=n, dtype=dtype, device="cpu")
                empty = flat.view(shape)
            except RuntimeError as error:  # torch's word for a full disk
                raise DataError(f"{path} cannot be written: {error}") from error
            torch.save(empty, out)
        with zipfile.ZipFile(out) as archive:
            (entry,) = (e for e in archive.infolist() if e.filename.endswith("/data/0"))
            central_directory = archive.start_dir
        start = start_of_entry(out, entry)
        out.seek(start)
        checksum = 0
        for some in rows:
            content = some.contiguous().view(torch.uint8).numpy().data
            checksum = zlib.crc32(content, checksum)
            out.write(content)
        if out.tell() != start + entry.file_size:
            raise ValueError(f"{out.tell() - start} bytes of rows for a tensor of shape {shape}")
        _write_checksum(out, entry, central_directory, checksum)


def _write_checksum(
    file: BinaryIO, entry: zipfile.ZipInfo, central_directory: int, checksum: int
) -> None:
    """After the data and in the central directory, where a reader of zip files looks for it."""
    packed = struct.pack("<I", checksum)
    file.seek(DESCRIPTOR_CRC_AT, 1)
    file.write(packed)
    file.seek(central_directory)
    name_at = file.read().index(entry.filename.encode())
    file.seek(central_directory + name_at - CENTRAL_HEADER_BYTES + CENTRAL_CRC_AT)
    file.write(packed)
