"""Datasets of vectors: reading them, checking them, splitting them, normalizing them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowjobs.config import is_data_file
from flowjobs.errors import DataError
from flowjobs.runs.datasets import EMBEDDED, check_dataset, split_files
from flowjobs.runs.files import replaced_whole

# Rows that are read at once where a pass over all of a file is needed.
CHUNK_ROWS = 65_536
VAL_SHARE = 0.15


class FlowDataset(Dataset[Tensor]):
    """Vectors of one width, as they are in the file; the trainer normalizes them.

    Args:
        source: A `.pt` file that holds one tensor, a `.npy` file, or a tensor: of floats, of
            shape (n, dim). Files are mapped into memory, not read.

    Raises:
        DataError: The file is missing, unreadable, of another shape or type, empty, or holds a
            value that is not finite; the text names the file and the row.
    """

    def __init__(self, source: str | Path | Tensor) -> None:
        self.name = "tensor" if isinstance(source, Tensor) else str(source)
        self.data = source if isinstance(source, Tensor) else _load(Path(source))
        _check(self.data, self.name)

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.data.shape[1]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | Sequence[int]) -> Tensor:
        """A row of shape (dim,), or the rows of a list of indices, as float32."""
        return self.data[index].float()


def normalization_stats(dataset: FlowDataset) -> dict[str, Tensor]:
    """Mean and standard deviation of each column, in float32 of shape (dim,).

    A column that hardly varies (a pixel that is nearly always black) keeps a standard deviation
    of a tenth of the average column's, so that it is not blown up.
    """
    total = torch.zeros(dataset.dim, dtype=torch.float64)
    squares = torch.zeros_like(total)
    n = len(dataset)
    for chunk in torch.split(dataset.data, CHUNK_ROWS):
        total += chunk.double().sum(0)
    mean = total / n
    for chunk in torch.split(dataset.data, CHUNK_ROWS):
        squares += (chunk.double() - mean).square().sum(0)
    std = (squares / n).sqrt()
    floor = 0.1 * std.mean()
    if floor == 0:
        raise DataError(f"{dataset.name}: all {n} rows are the same; there is nothing to learn")
    return {"mean": mean.float(), "std": std.clamp_min(floor).float()}


def load_datasets(dataset: str, study: Path) -> tuple[FlowDataset, FlowDataset]:
    """The training and the validation part of `--dataset`.

    Args:
        dataset: `digits`, the name of splits under the study, or the path of a .pt or .npy file
            (whose last 15 % after a fixed shuffle are the validation part).
        study: The root of the study.
    """
    check_dataset(dataset, study)
    if is_data_file(dataset):
        whole = FlowDataset(dataset)
        if len(whole) < 2:
            raise DataError(f"{dataset} has one row, expected at least 2: some are for validation")
        train, val = split_rows(whole.data, _val_count(len(whole)))
        parts = FlowDataset(train), FlowDataset(val)
        parts[0].name, parts[1].name = f"{dataset} (training)", f"{dataset} (validation)"
        return parts
    train_file, val_file = split_files(study, dataset)
    if dataset == EMBEDDED and not train_file.exists():
        write_splits(load_digits(), study, {EMBEDDED: None})
    parts = FlowDataset(train_file), FlowDataset(val_file)
    if parts[0].dim != parts[1].dim:
        raise DataError(
            f"{train_file} has width {parts[0].dim}, {val_file} has width {parts[1].dim}: "
            "both must be of one width"
        )
    return parts


def load_digits() -> Tensor:
    """The 1797 handwritten digits that scikit-learn ships, of shape (1797, 64), from 0 to 16."""
    from sklearn.datasets import load_digits as load

    return torch.from_numpy(load().data).float()


def split_rows(data: Tensor, n_val: int) -> tuple[Tensor, Tensor]:
    """Training and validation rows after a shuffle that is always the same."""
    # Not the run's seed: runs of several seeds are compared on the same validation rows.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data[order[n_val:]], data[order[:n_val]]


def write_splits(
    data: Tensor, study: Path, sizes: dict[str, int | None], *, overwrite: bool = False
) -> dict[str, int]:
    """Write nested splits: a smaller one's rows are the first of a larger one's.

    Args:
        data: All rows, shape (n, dim).
        study: The root of the study.
        sizes: Training rows by the name of the split; None for all that are left.
        overwrite: Replace splits of these names that hold other rows.

    Returns:
        The training rows written by name. All splits share one validation part.

    Raises:
        DataError: A split asks for more rows than there are, or is there with other rows. Nothing
            is written then.
    """
    train, val = split_rows(data, _val_count(len(data)))
    if len(train) == 0:
        raise DataError(f"{len(data)} rows are too few to split: expected at least 2")
    for name, size in sizes.items():
        if size is not None and not 1 <= size <= len(train):
            raise DataError(
                f"--sizes: {name} asks for {size} training rows; {len(train)} are left of "
                f"{len(data)} after {len(val)} for validation"
            )
        there = split_files(study, name)[0]
        part = train[:size]
        if there.exists() and not overwrite and not torch.equal(FlowDataset(there).data, part):
            raise DataError(f"{there} holds other rows: remove it, or add --overwrite")
    written = {}
    for name, size in sizes.items():
        part = train[:size]
        train_file, val_file = split_files(study, name)
        train_file.parent.mkdir(parents=True, exist_ok=True)
        # The validation part first: where train.pt is, the split is complete.
        for file, rows in ((val_file, val), (train_file, part)):
            with replaced_whole(file) as out:
                torch.save(rows.contiguous().clone(), out)
        written[name] = len(part)
    return written


def _val_count(n: int) -> int:
    return max(1, round(VAL_SHARE * n))


def _load(path: Path) -> Tensor:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            # Copy-on-write, since torch warns of memory that it may not write to.
            return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # torch and numpy raise a dozen types for a bad file, none of which names it.
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as a {path.suffix} file: {reason}") from error
    if not isinstance(loaded, Tensor):
        raise DataError(f"{path} holds a {type(loaded).__name__}, expected one tensor (n, dim)")
    return loaded


def _check(data: Tensor, name: str) -> None:
    shape = tuple(data.shape)
    if data.ndim != 2 or 0 in shape:
        raise DataError(f"{name} has shape {shape}, expected (n, dim) with at least one row")
    if not data.is_floating_point():
        raise DataError(f"{name} is of type {data.dtype}, expected floats")
    for start in range(0, len(data), CHUNK_ROWS):
        finite = torch.isfinite(data[start : start + CHUNK_ROWS]).all(dim=1)
        if not bool(finite.all()):
            row = start + int((~finite).nonzero()[0])
            raise DataError(f"{name}: row {row} has a value that is NaN or infinite")
