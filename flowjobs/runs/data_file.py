"""What a file of data holds, found out without torch: its layout, its content, a value not finite.

Reads .npy files and .pt files as torch.save writes them. Runs no code from a file. Nothing is
known here of other files (torch's old format, say); torch says more when it loads one.
"""

import ast
import hashlib
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

from flowjobs.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    Places: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

# Up to here all bytes of a file decide its digest; of a larger one, as many in blocks at even
# distances. That takes a tenth of a second, where all of it could take minutes at each start. What
# is replaced, cut short or permuted is noticed; a change of a few rows between blocks is not.
WHOLE_DIGEST_BYTES = 64 * 1024**2
# Looking for NaN is faster.
WHOLE_CHECK_BYTES = 256 * 1024**2
BLOCK_BYTES = 256 * 1024

BYTES_OF_TYPE = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}
ONE_TENSOR = "save that alone, torch.save(torch.as_tensor(rows), path), or use numpy.save"
FLOATS = ("float16", "bfloat16", "float32", "float64")

# The zip format, which .pt files have.
LOCAL_HEADER_BYTES = 30
LOCAL_LENGTHS_AT = 26  # of the name and of what follows it, two bytes each

NPY_MAGIC = b"\x93NUMPY"
NPY_TYPES = {
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "u1": "uint8",
    "i1": "int8",
    "i2": "int16",
    "i4": "int32",
    "i8": "int64",
    "b1": "bool",
    "c8": "complex64",
    "c16": "complex128",
}
TORCH_STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}

Read = Callable[[int, int], bytes | bytearray | memoryview]


@dataclass(frozen=True)
class Layout:
    """Where the numbers of one array are in a file.

    Attributes:
        shape: The array's.
        dtype: Type of the numbers, by torch's name without "torch.".
        offset: Where the first number is in the file, in bytes.
        strides: How many numbers further the next one of each dimension is.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    strides: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the numbers."""
        return math.prod(self.shape) * BYTES_OF_TYPE[self.dtype]

    @property
    def row_major(self) -> bool:
        """Whether the rows lie one after another, without gaps."""
        return all(
            length == 1 or stride == expected  # of one row, the stride says nothing
            for length, stride, expected in zip(
                self.shape, self.strides, row_major_strides(self.shape), strict=True
            )
        )

    @property
    def dense(self) -> bool:
        """Whether the numbers lie in one piece, in whichever order (as of a transposed array)."""
        expected = 1
        for stride, length in sorted(zip(self.strides, self.shape, strict=True)):
            if length > 1 and stride != expected:
                return False
            expected *= length
        return True

    def in_order_of_rows(self, places: "Places") -> "Places":
        """Where numbers of a dense array would be if its rows lay one after another.

        Args:
            places: Where they are in the file. Both are counted in numbers, from 0.
        """
        found = places * 0
        row_major = row_major_strides(self.shape)
        for dimension in sorted(range(len(self.shape)), key=lambda d: -self.strides[d]):
            if self.shape[dimension] > 1:
                index, places = divmod(places, self.strides[dimension])
                found = found + index * row_major[dimension]
        return found


@dataclass(frozen=True)
class DataContent:
    """What data are, wherever they lie and however they are stored.

    Attributes:
        rows: How many.
        dim: Numbers of a row.
        dtype: Type of the numbers.
        digest: Digest of the numbers, in the order of the rows.
    """

    rows: int
    dim: int
    dtype: str
    digest: str

    def __str__(self) -> str:
        return f"{self.rows} rows of width {self.dim} ({self.dtype}, digest {self.digest})"


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many numbers further the next one of each dimension is, where rows follow one another."""
    return tuple(math.prod(shape[number + 1 :]) for number in range(len(shape)))


def content_of(shape: tuple[int, ...], dtype: str, n_bytes: int, read: Read) -> DataContent:
    """The content of rows that lie one after another.

    Args:
        shape: (n, *shape).
        dtype: Type of the numbers.
        n_bytes: Size of all of them.
        read: Gives so many bytes (second) from a place on (first, from 0).
    """
    digest = hashlib.sha256(f"{shape} {dtype}\n".encode())
    for start, size in _blocks(n_bytes, WHOLE_DIGEST_BYTES):
        digest.update(read(start, size))
    return DataContent(shape[0], math.prod(shape[1:]), dtype, digest.hexdigest()[:16])


def content_of_file(path: Path) -> DataContent | None:
    """The content of a file; None where it is not known without torch.

    Raises:
        DataError: It can surely not be used; the text names the file.
    """
    with _opened(path) as file:
        layout = _known_layout(file, path)
        if layout is None:
            return None
        read = _reader(file, layout)
        if not layout.row_major:
            # A block of rows of a large one would be thousands of pieces of the file.
            if not layout.dense or layout.n_bytes > WHOLE_DIGEST_BYTES:
                return None
            read = _reader_of_rows(read(0, layout.n_bytes), layout)
        return content_of(layout.shape, layout.dtype, layout.n_bytes, read)


def check_file(path: Path) -> Layout | None:
    """Raise a DataError for a file that can surely not be trained on; the text names it.

    A large file is looked at in blocks, so that this takes a second at most.

    Returns:
        Its layout; None where that is not known without torch.
    """
    with _opened(path) as file:
        layout = _known_layout(file, path)
        if layout is None or not layout.dense:
            return layout
        read = _reader(file, layout)
        width = math.prod(layout.shape[1:])
        firsts: list[int] = []
        rows: set[int] = set()
        for start, size in _blocks(layout.n_bytes, WHOLE_CHECK_BYTES):
            before = start // BYTES_OF_TYPE[layout.dtype]
            places = before + _not_finite(read(start, size), layout.dtype)
            if places.size:
                places = layout.in_order_of_rows(places)
                firsts.append(int(places.min()))
                rows.update((places // width).tolist())
        if firsts:
            row, column = divmod(min(firsts), width)
            whole = layout.n_bytes <= WHOLE_CHECK_BYTES
            raise DataError(f"{path}: {not_finite_words(row, column, len(rows), whole=whole)}")
    return layout


def not_finite_words(row: int, column: int, rows: int, *, whole: bool = True) -> str:
    """What is said of data with values that are not finite.

    Args:
        row: The first row that has one.
        column: Where in that row, counted as if it were flat.
        rows: How many rows have one.
        whole: Whether all rows were looked at.
    """
    text = f"row {row} has a value that is NaN or infinite (column {column})"
    if rows > 1:
        return f"{text}; {'' if whole else 'at least '}{rows} rows have one"
    return f"{text}; no other row has one" if whole else text


def shape_of_file(path: Path) -> tuple[int, ...] | None:
    """(n, *shape) of a file; None where it is not known without torch.

    Raises:
        DataError: It can surely not be used; the text names the file.
    """
    with _opened(path) as file:
        layout = _known_layout(file, path)
    return layout.shape if layout else None


def check_shape(shape: tuple[int, ...], dtype: str, name: str) -> None:
    """Raise a DataError unless these are rows of floats; `name` is for the error's text."""
    if len(shape) < 2 or 0 in shape:
        raise DataError(
            f"{name} has shape {shape}, expected (n, dim), or (n, *shape) for a model of your own, "
            "with at least one row"
        )
    if dtype not in FLOATS:
        raise DataError(f"{name} is of type {dtype}, expected floats ({', '.join(FLOATS)})")


def read_layout(file: BinaryIO, path: Path) -> Layout | None:
    """Where the numbers are in an open file; None where that is not known without torch.

    Raises:
        DataError: It is damaged, or holds something else.
    """
    size = file.seek(0, 2)
    file.seek(0)
    try:
        layout = _npy_layout(file) if path.suffix == ".npy" else _pt_layout(file)
    except (ValueError, SyntaxError, KeyError, EOFError, struct.error, zipfile.BadZipFile) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read as a {path.suffix} file: {reason}") from error
    except _NoTensorError as error:
        raise DataError(f"{path} holds a {error}, expected one tensor: {ONE_TENSOR}") from None
    if layout is not None and layout.dense and layout.offset + layout.n_bytes > size:
        raise DataError(
            f"{path} has {size} bytes, expected {layout.offset + layout.n_bytes} for shape "
            f"{layout.shape}: it was cut short"
        )
    return layout


def start_of_entry(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin in a zip archive that stores it as it is."""
    file.seek(entry.header_offset + LOCAL_LENGTHS_AT)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return entry.header_offset + LOCAL_HEADER_BYTES + int(name_bytes) + int(extra_bytes)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _known_layout(file: BinaryIO, path: Path) -> Layout | None:
    layout = read_layout(file, path)
    if layout is not None:
        check_shape(layout.shape, layout.dtype, str(path))
    return layout


def _reader(file: BinaryIO, layout: Layout) -> Read:
    def read(start: int, size: int) -> bytes:
        file.seek(layout.offset + start)
        return file.read(size)

    return read


def _reader_of_rows(content: bytes | bytearray | memoryview, layout: Layout) -> Read:
    """Reads a dense array as if its rows lay one after another."""
    import numpy as np  # slow to load, and not needed for the embedded data

    size = BYTES_OF_TYPE[layout.dtype]
    # As whole numbers of that size: numpy has no bfloat16.
    strides = [stride * size for stride in layout.strides]
    array: np.ndarray[Any, Any] = np.ndarray(layout.shape, f"u{size}", content, 0, strides)
    rows = array.tobytes()
    return lambda start, size: rows[start : start + size]


def _blocks(n_bytes: int, whole: int) -> Iterator[tuple[int, int]]:
    """Start and size of what is read of so many bytes, in whole numbers of 16 bytes each."""
    if n_bytes <= whole:
        for start in range(0, n_bytes, BLOCK_BYTES):
            yield start, min(BLOCK_BYTES, n_bytes - start)
        return
    count = whole // BLOCK_BYTES
    for number in range(count):
        yield number * (n_bytes - BLOCK_BYTES) // (count - 1) // 16 * 16, BLOCK_BYTES


def _not_finite(block: bytes | bytearray | memoryview, dtype: str) -> "Places":
    """Which of a block of numbers are NaN or infinite, from 0."""
    import numpy as np  # slow to load, and not needed for the embedded data

    if dtype == "bfloat16":  # numpy has none: a float32 without its last two bytes
        bad = (np.frombuffer(block, np.uint16) & 0x7F80) == 0x7F80
    else:
        bad = ~np.isfinite(np.frombuffer(block, dtype))
    return np.flatnonzero(bad)


def _npy_layout(file: BinaryIO) -> Layout | None:
    """See numpy.lib.format, whose reader of headers would need all of numpy."""
    if file.read(6) != NPY_MAGIC:
        raise ValueError("it does not begin as one")
    major, _ = file.read(2)
    length_format = "<H" if major == 1 else "<I"
    (length,) = struct.unpack(length_format, file.read(struct.calcsize(length_format)))
    header = ast.literal_eval(file.read(length).decode("latin-1").strip())
    descr, shape = header["descr"], header["shape"]
    if not isinstance(descr, str) or descr[1:] not in NPY_TYPES:
        raise ValueError(f"found numbers of type {descr!r}, expected floats")
    if descr[0] not in "|=" and descr[0] != ("<" if sys.byteorder == "little" else ">"):
        raise ValueError(f"its bytes are in the order of another machine ({descr})")
    strides = row_major_strides(shape)
    if header["fortran_order"]:
        strides = row_major_strides(shape[::-1])[::-1]
    return Layout(tuple(shape), NPY_TYPES[descr[1:]], file.tell(), strides)


def _pt_layout(file: BinaryIO) -> Layout | None:
    if not zipfile.is_zipfile(file):
        file.seek(0)
        begin = file.read(2)
        if begin[:1] == b"\x80":
            return None  # a pickle: torch's format before 2020
        raise ValueError(
            "it is cut short"
            if begin == b"PK"
            else "expected a .pt file (torch.save) or a .npy file (numpy.save)"
        )
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        folder = next(name for name in [*names, "/data.pkl"] if name.endswith("/data.pkl"))[:-8]
        if f"{folder}byteorder" in names:
            order = archive.read(f"{folder}byteorder").decode()
            if order != sys.byteorder:
                return None
        try:
            with archive.open(f"{folder}data.pkl") as pickled:
                found = _TensorUnpickler(pickled).load()
        except (pickle.UnpicklingError, TypeError, AttributeError, IndexError):
            return None  # of more than tensors, or of a newer torch
        if isinstance(found, _Sparse):
            return None
        if not isinstance(found, _Tensor):
            raise _NoTensorError(type(found).__name__)
        _, storage, key, _, _ = found.storage
        if storage not in TORCH_STORAGES:
            return None
        entry = archive.getinfo(f"{folder}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
        dtype = TORCH_STORAGES[storage]
        offset = start_of_entry(file, entry) + found.offset * BYTES_OF_TYPE[dtype]
    return Layout(tuple(found.shape), dtype, offset, tuple(found.stride))


class _NoTensorError(Exception):
    """A .pt file holds something else; the text is its type."""


class _Tensor(NamedTuple):
    """The arguments of torch._utils._rebuild_tensor_v2."""

    storage: tuple[str, str, str, str, int]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Sparse:
    """A tensor of another layout; torch's loader says what it is."""

    def __init__(self, *arguments: Any) -> None: ...


class _TensorUnpickler(pickle.Unpickler):
    """Reads a pickle of tensors and plain values, and calls nothing of what it names."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda *arguments: _Tensor(*arguments[:4])
            case "torch._utils", "_rebuild_parameter":
                return lambda tensor, *_: tensor
            case "torch._utils", "_rebuild_sparse_tensor":
                return _Sparse
            case "torch", _ if name.endswith("Storage"):
                return name
            case "collections", "OrderedDict":
                return OrderedDict
        if module.partition(".")[0] in ("torch", "collections"):
            raise pickle.UnpicklingError(f"{module}.{name}")  # a tensor of some kind, maybe
        raise _NoTensorError("numpy array" if module.startswith("numpy") else f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid
