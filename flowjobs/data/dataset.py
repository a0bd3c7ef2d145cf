"""Datasets of vectors: reading them, checking them, splitting them, normalizing them."""

import copy
import logging
import math
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowjobs.config import is_data_file
from flowjobs.data.memory import free_memory_bytes
from flowjobs.data.row_reader import RowReader
from flowjobs.data.tensor_file import write_tensor
from flowjobs.data.toy import toy_set
from flowjobs.default_logging import default_logging
from flowjobs.errors import DataError
from flowjobs.runs.data_file import (
    FLOATS,
    ONE_TENSOR,
    DataContent,
    check_shape,
    content_of,
    not_finite_words,
    read_layout,
)
from flowjobs.runs.datasets import (
    DIGITS,
    EMBEDDED,
    check_dataset,
    check_rows,
    check_shapes,
    split_files,
    validation_rows,
)

logger = logging.getLogger(__name__)

# A pass over all rows that takes longer is spoken of, and again after four times as long.
SAY_AFTER_S = 10.0
# What is looked at at once where a pass over all rows is needed, in float64.
CHUNK_BYTES = 8 * 1024**2
# A smaller file is read into memory; of a larger one rows are read when they are asked for.
LARGE_BYTES = 64 * 1024**2
# A column varies in hardly any row where one is so far out (of two values, in one of 256), and
# nearly all have one value: of long tails (a price, a count) every row is far from the others.
RARE_DEVIATIONS, RARE_SHARE = 16, 1 / 16
# Among so many rows, all over the file, the commonest value of such a column is found.
SAMPLED_ROWS = 64


class FlowDataset(Dataset[Tensor]):
    """Rows of one shape, as they are in the file; the trainer normalizes them.

    Args:
        source: A `.pt` file that holds one tensor, a `.npy` file, a tensor or an array: of floats,
            of shape (n, dim) or (n, *shape). A small file is read into memory; of a large one rows
            are read when they are asked for, which ends in a DataError if it has changed since.

    Raises:
        DataError: It is something else, or the file is missing or unreadable; or the rows are of
            another shape or type, empty, or hold a value that is not finite: the text names the
            file and the row.
    """

    def __init__(self, source: str | Path | Tensor | np.ndarray[Any, Any]) -> None:
        self.name, self._source = _opened(source)
        if isinstance(self._source, Tensor):
            check_shape(tuple(self._source.shape), _word(self._source.dtype), self.name)
        self._index: Tensor | None = None
        self._content: DataContent | None = None
        self._check_finite()

    def part(self, index: Tensor, name: str) -> "FlowDataset":
        """Some of the rows, in the order of `index`, int64 of shape (m,) or a mask; copies none."""
        if index.dtype == torch.bool:
            index = torch.arange(len(self), device="cpu")[index]
        part = copy.copy(self)
        part._index = index if self._index is None else self._index[index]
        part.name = name
        return part

    @property
    def content(self) -> DataContent:
        """What the rows of the whole file are, also of a part."""
        if isinstance(self._source, RowReader):
            return self._source.content
        if self._content is None:
            self._content = _content_of_tensor(self._source)
        return self._content

    def is_of_one_source_with(self, other: "FlowDataset") -> bool:
        """Whether both are parts of the same file or tensor."""
        return self._source is other._source

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return tuple(self._source.shape[1:])

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers in the file."""
        return self._source.dtype

    @property
    def data(self) -> Tensor:
        """All rows, shape (n, *shape); of a part or a large file, a copy."""
        if self._index is None and isinstance(self._source, Tensor):
            return self._source
        return self._rows(slice(None))

    def __len__(self) -> int:
        return self._source.shape[0] if self._index is None else len(self._index)

    def __getitem__(self, index: int | Sequence[int] | slice | Tensor) -> Tensor:
        """A row, or the rows of a list of indices or a slice.

        Of float32, or float64 where the file is: its digits may be needed until it is centred.
        """
        rows = self._rows(index)
        return rows if rows.dtype == torch.float64 else rows.float()

    def in_order(self) -> Iterator[Tensor]:
        """All rows once, (m, *shape) at a time, of the file's type."""
        n = rows_of_chunk(self.dim)
        progress = _PassProgress(self)
        for start in range(0, len(self), n):
            progress.say(start)
            yield self._rows(slice(start, start + n))

    def in_order_of_file(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows once, which is fast where they do not fit in memory.

        Yields:
            The indices of some rows in this dataset, int64 of shape (m,), and the rows, of shape
            (m, *shape) and the file's type.
        """
        order = (
            torch.arange(len(self), device="cpu") if self._index is None else self._index.argsort()
        )
        progress, n_read = _PassProgress(self), 0
        for indices in torch.split(order, rows_of_chunk(self.dim)):
            progress.say(n_read)
            yield indices, self._rows(indices)
            n_read += len(indices)

    def _rows(self, index: int | Sequence[int] | slice | Tensor) -> Tensor:
        """Rows of the file's type."""
        places = index if self._index is None else self._index[index]
        if isinstance(self._source, RowReader):
            return self._source.rows(places)
        return self._source[places]

    def _check_finite(self) -> None:
        first: tuple[int, int] | None = None
        count = 0
        for indices, rows in self.in_order_of_file():
            finite = torch.isfinite(rows).flatten(1)
            bad = ~finite.all(dim=1)
            if bool(bad.any()):
                column = int((~finite[bad][0]).nonzero()[0])
                first = first or (int(indices[bad][0]), column)
                count += int(bad.sum())
        if first:
            raise DataError(f"{self.name}: {not_finite_words(*first, count)}")


class _PassProgress:
    """Says now and then how far a pass over all rows is, whoever asked for it."""

    def __init__(self, dataset: FlowDataset) -> None:
        self._dataset = dataset
        self._started, self._say_after_s = time.monotonic(), SAY_AFTER_S

    def say(self, n_read: int) -> None:
        """Say how many rows are read, if that takes long."""
        if (elapsed_s := time.monotonic() - self._started) > self._say_after_s:
            self._say_after_s *= 4
            name, n = self._dataset.name, len(self._dataset)
            words = "%s: %d of %d rows read in %.0f s, in a pass over all of them"
            with default_logging():
                logger.info(words, name, n_read, n, elapsed_s)


def rows_of_chunk(dim: int) -> int:
    """How many rows of this width are looked at at once."""
    return max(1, CHUNK_BYTES // (8 * dim))


def normalization_stats(dataset: FlowDataset) -> dict[str, Tensor]:
    """Mean and standard deviation of each column, of the shape of a row.

    Each column has a scale of its own, however far from the others'. One that varies in hardly any
    row (a pixel that is nearly always black) gets a larger standard deviation than it has, so that
    the few rows are not blown up: a tenth of the average column's, or half of its own largest
    deviation where that is less.

    A function of the data to the last bit, on any processor and with any number of threads.

    Returns:
        `mean` and `std`: float64 where the data are, or where float32 would move a value by more
        than a ten-thousandth of its column's deviation; else float32.
    """
    last = len(dataset) - 1
    spread = torch.linspace(0, last, SAMPLED_ROWS, dtype=torch.float64, device="cpu").long()
    columns = _Columns(dataset._rows(spread).double().flatten(1).mode(dim=0).values)
    for _, rows in dataset.in_order_of_file():
        columns.add(rows.double().flatten(1))
    std = (columns.squares / columns.n).sqrt()
    if not bool(torch.isfinite(std).all()):
        raise DataError(f"{dataset.name}: column {int(std.argmax())} has values that are too large")
    floor = 0.1 * (_sum(std) / dataset.dim)
    if floor == 0:
        n = len(dataset)
        raise DataError(f"{dataset.name}: all {n} rows are the same; there is nothing to learn")
    # Where all rows are the same, the mean is off by rounding, and so is the deviation.
    constant = columns.high == columns.low
    mean = torch.where(constant, columns.low, columns.mean)
    reach = torch.maximum(columns.high - mean, mean - columns.low)
    own = torch.where(constant, torch.where(mean == 0, 1.0, mean.abs()), reach / 2)
    varies_rarely = columns.others < RARE_SHARE * columns.n
    rare = constant | (varies_rarely & (reach > RARE_DEVIATIONS * std))
    std = torch.where(rare, torch.maximum(std, floor.minimum(own)), std)
    stats = {"mean": mean.view(dataset.shape), "std": std.view(dataset.shape)}
    if dataset.dtype == torch.float64:
        return stats
    rounded = {key: value.float() for key, value in stats.items()}
    moved = [(rounded[key].double() - stats[key]).abs() for key in stats]
    return rounded if bool((moved[0] + moved[1] <= 1e-4 * stats["std"]).all()) else stats


def no_normalization(dataset: FlowDataset) -> dict[str, Tensor]:
    """The `mean` and `std` that leave the data as they are."""
    dtype = torch.float64 if dataset.dtype == torch.float64 else torch.float32
    return {
        "mean": torch.zeros(dataset.shape, dtype=dtype, device="cpu"),
        "std": torch.ones(dataset.shape, dtype=dtype, device="cpu"),
    }


def is_same_normalization(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two `mean` and `std` differ by what rounding makes of the same data, if at all."""
    if any(key not in one or one[key].shape != other[key].shape for key in ("mean", "std")):
        return False
    for key in ("mean", "std"):
        # The less precise of two types limits how closely they can agree.
        digits = max(torch.finfo(stats[key].dtype).eps for stats in (one, other))
        first, second, std = (of.double().cpu() for of in (one[key], other[key], other["std"]))
        if bool(((first - second).abs() > 8 * digits * second.abs() + 1e-6 * std).any()):
            return False
    return True


def _sum(rows: Tensor) -> Tensor:
    """The sum over the first dimension, in an order that follows from the shape alone.

    That of torch's own sum follows from the threads, and from what the processor can do.
    """
    rows = rows.clone()
    while (n := len(rows)) > 1:
        half = (n + 1) // 2
        rows[: n - half] += rows[half:]
        rows = rows[:half]
    return rows[0]


class _Columns:
    """Number, mean, sum of squared deviations and range of each column, in one pass (float64).

    Parts are joined as by Chan et al. (https://doi.org/10.1080/00031305.1983.10483115), which keeps
    the digits of a small deviation from a large mean. `others` counts the rows that have another
    value than `common`, both of shape (dim,).
    """

    def __init__(self, common: Tensor) -> None:
        self.n = 0
        self.common = common
        self.mean = torch.zeros_like(common)
        self.squares = torch.zeros_like(self.mean)
        self.low = torch.full_like(self.mean, math.inf)
        self.high = -self.low
        self.others = torch.zeros_like(common, dtype=torch.int64)

    def add(self, rows: Tensor) -> None:
        """Take in some rows, shape (m, dim)."""
        self.others += (rows != self.common).sum(dim=0)
        low, high = torch.aminmax(rows, dim=0)
        self.low, self.high = self.low.minimum(low), self.high.maximum(high)
        mean = _sum(rows) / len(rows)
        share = len(rows) / (self.n + len(rows))
        between = (mean - self.mean).square() * (self.n * share)
        self.squares += _sum((rows - mean).square_()) + between
        self.mean += (mean - self.mean) * share
        self.n += len(rows)


def load_datasets(
    dataset: str, study: Path, option: str = "--dataset"
) -> tuple[FlowDataset, FlowDataset]:
    """The training and the validation part of `--dataset`.

    Args:
        dataset: An embedded one (digits, toy sets), the name of splits under the study, or the path
            of a .pt or .npy file (whose last 15 % after a fixed shuffle are the validation part).
        study: The root of the study.
        option: What asks for it, for an error's text.
    """
    check_dataset(dataset, study, option)
    if is_data_file(dataset):
        whole = FlowDataset(dataset)
        check_rows(dataset, len(whole))
        return split(whole)
    train_file, val_file = split_files(study, dataset)
    if dataset in EMBEDDED and not train_file.exists():
        _write_embedded(dataset, study)
    train, val = FlowDataset(train_file), FlowDataset(val_file)
    check_shapes(train_file, train.shape, val_file, val.shape)
    return train, val


def _write_embedded(dataset: str, study: Path) -> None:
    if dataset == DIGITS:
        write_splits(FlowDataset(load_digits()), study, {DIGITS: None})
        return
    whole = FlowDataset(toy_set(dataset))
    train, val = (
        whole.part(part, dataset) for part in torch.arange(len(whole), device="cpu").chunk(2)
    )
    _write_split(study, dataset, train, val)


def content_by_part(train: FlowDataset, val: FlowDataset) -> dict[str, DataContent]:
    """The content of each file that a run's data come from."""
    if train.is_of_one_source_with(val):
        return {"data": train.content}
    return {"train": train.content, "val": val.content}


def load_digits() -> Tensor:
    """The 1797 handwritten digits that scikit-learn ships, of shape (1797, 64), from 0 to 16."""
    from sklearn.datasets import load_digits as load

    return torch.from_numpy(load().data).float()


def split(whole: FlowDataset) -> tuple[FlowDataset, FlowDataset]:
    """The training and the validation part after a shuffle that is always the same."""
    # Not the run's seed: runs of several seeds are compared on the same validation rows.
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(whole), generator=generator, device="cpu")
    n_val = validation_rows(len(whole))
    return (
        whole.part(order[n_val:], f"{whole.name} (training)"),
        whole.part(order[:n_val], f"{whole.name} (validation)"),
    )


def write_splits(
    whole: FlowDataset, study: Path, sizes: dict[str, int | None], *, overwrite: bool = False
) -> dict[str, int]:
    """Write nested splits: a smaller one's rows are the first of a larger one's.

    Args:
        whole: All rows.
        study: The root of the study.
        sizes: Training rows by the name of the split; None for all that are left.
        overwrite: Replace splits of these names that hold other rows.

    Returns:
        The training rows written by name. All splits share one validation part.

    Raises:
        DataError: A split asks for more rows than there are, or is there with other rows. Nothing
            is written then.
    """
    if len(whole) < 2:
        raise DataError(f"{len(whole)} rows are too few to split: expected at least 2")
    train, val = split(whole)
    parts = {}
    for name, size in sizes.items():
        if size is not None and not 1 <= size <= len(train):
            raise DataError(
                f"--sizes: {name} asks for {size} training rows; {len(train)} are left of "
                f"{len(whole)} after {len(val)} for validation"
            )
        parts[name] = train.part(torch.arange(len(train), device="cpu")[:size], name)
        there = split_files(study, name)[0]
        if there.exists() and not overwrite and not same_rows(FlowDataset(there), parts[name]):
            raise DataError(
                f"{there} holds other rows: give these another --name; --overwrite replaces those, "
                "which runs may have been trained on"
            )
    for name, part in parts.items():
        _write_split(study, name, part, val)
    return {name: len(part) for name, part in parts.items()}


def _write_split(study: Path, name: str, train: FlowDataset, val: FlowDataset) -> None:
    train_file, val_file = split_files(study, name)
    train_file.parent.mkdir(parents=True, exist_ok=True)
    # The validation part first: where train.pt is, the split is complete.
    for rows, file in ((val, val_file), (train, train_file)):
        write_tensor(file, (len(rows), *rows.shape), rows.dtype, rows.in_order())


def same_rows(first: FlowDataset, second: FlowDataset) -> bool:
    """Whether both hold the same numbers in the same order."""
    if (len(first), first.shape, first.dtype) != (len(second), second.shape, second.dtype):
        return False
    pairs = zip(first.in_order(), second.in_order(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _opened(source: object) -> tuple[str, Tensor | RowReader]:
    """What errors call the rows, and the rows."""
    match source:
        case Tensor():
            return "tensor", _dense(source, "tensor")
        case np.ndarray():
            return "array", _as_tensor(source)
        case str() | os.PathLike():
            return str(source), _load(Path(source))
    raise DataError(
        f"FlowDataset: found a {type(source).__name__}, expected the path of a .pt or .npy file, a "
        "tensor, or an array: numpy.asarray(rows, dtype=numpy.float32), say"
    )


def _as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    if np.ma.is_masked(array):
        raise DataError("array: some of its values are masked; fill them, or leave out their rows")
    # A copy where torch could not use the memory, or would warn that it is read-only.
    if not (array.dtype.isnative and array.flags.c_contiguous and array.flags.writeable):
        _check_room_for_copy(array.nbytes)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    except TypeError as error:
        raise DataError(
            f"array is of type {array.dtype.name}, expected floats ({', '.join(FLOATS)}); "
            "numpy.asarray(rows, dtype=numpy.float32), say"
        ) from error


def _check_room_for_copy(size: int) -> None:
    """Raise a DataError where a large array, as one that is a map of a file, cannot be copied."""
    if size >= LARGE_BYTES and size > (free := free_memory_bytes()):
        raise DataError(
            f"array is read-only, of another byte order or not contiguous, so that all "
            f"{size / 1e9:.1f} GB of it must be copied into memory, and {free / 1e9:.1f} GB are "
            "free: give FlowDataset the path of its .npy file, of which rows are read when they "
            "are asked for, or open it by numpy.load(path, mmap_mode='c')"
        )


def _dense(found: Tensor, name: str) -> Tensor:
    """A tensor on the CPU, where rows are taken by indices; `data_placement` moves them."""
    if found.is_meta:
        raise DataError(f"{name} is of the device meta, which has no numbers")
    if found.layout is not torch.strided:
        raise DataError(f"{name} is of layout {found.layout}, expected a dense one (.to_dense())")
    # Left in a graph, each step's loss would reach back into that.
    return (found.detach() if found.requires_grad else found).cpu()


def _load(path: Path) -> Tensor | RowReader:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            layout = read_layout(file, path)
            if layout is not None:
                check_shape(layout.shape, layout.dtype, str(path))
            if layout is not None and layout.row_major:
                if layout.n_bytes >= LARGE_BYTES:
                    return RowReader(path, layout)
                content = bytearray(layout.n_bytes)
                file.seek(layout.offset)
                if file.readinto(content) < len(content):
                    raise DataError(f"{path} was cut short while it was read")
                flat = torch.frombuffer(content, dtype=getattr(torch, layout.dtype))
                return flat.view(layout.shape)
        _check_room(path)
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than one tensor, and is not loaded, since that would run code from "
            f"the file: {ONE_TENSOR}"
        ) from error
    except Exception as error:
        # torch and numpy raise a dozen types for a bad file, none of which names it.
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as a {path.suffix} file: {reason}") from error
    if not isinstance(loaded, Tensor):
        raise DataError(
            f"{path} holds a {type(loaded).__name__}, expected one tensor: {ONE_TENSOR}"
        )
    return _dense(loaded, f"the tensor of {path}")


def _check_room(path: Path) -> None:
    """Raise a DataError where a file that must be read whole does not fit in memory."""
    size, free = path.stat().st_size, free_memory_bytes()
    if size > free:
        raise DataError(
            f"{path} does not hold its numbers row after row, so that all {size / 1e9:.1f} GB of "
            f"it must be in memory, and {free / 1e9:.1f} GB are free: save it again as a "
            "contiguous array (numpy.ascontiguousarray, Tensor.contiguous)"
        )


def _content_of_tensor(data: Tensor) -> DataContent:
    rows = data.detach().cpu().contiguous()
    content = memoryview(rows.view(torch.uint8).numpy().data).cast("B")
    shape, dtype = tuple(rows.shape), _word(rows.dtype)
    return content_of(shape, dtype, len(content), lambda start, size: content[start : start + size])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
