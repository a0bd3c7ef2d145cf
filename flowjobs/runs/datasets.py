"""Where a dataset is on disk and what it holds, without torch, so that `submit` can check it."""

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path

from flowjobs.config import DATA_FILE_SUFFIXES, PINNED, TrainingConfig, is_data_file
from flowjobs.errors import ConfigError, DataError
from flowjobs.formatting import counted
from flowjobs.nearest import did_you_mean, meant
from flowjobs.runs.data_file import DataContent, check_file, content_of_file, shape_of_file

DIGITS = "digits"
TOY_SETS = (
    *("8gaussians", "moons", "scurve"),
    *("8gaussians-tong", "moons-tong", "8gaussians-c2ot", "moons-c2ot"),
)
DIGITS_ROWS = 1797
TOY_ROWS = 10_000  # for training, and as many others for validation and measures
# How much of a file that is not split is for validation.
VAL_SHARE = 0.15
# Before the name of a part of a run's data: of what its paths start at, and of pairs of reflow.
SOURCE = "source "
PAIRS = "pairs "
# They need no file: their splits are written where they are first trained on.
EMBEDDED = (DIGITS, *TOY_SETS)


def split_files(study: Path, dataset: str) -> tuple[Path, Path]:
    """`STUDY/datasets/splits/NAME/train.pt` and `val.pt`."""
    folder = study / "datasets" / "splits" / dataset
    return folder / "train.pt", folder / "val.pt"


def pair_files(study: Path, reflow_from: str) -> tuple[Path, Path]:
    """Where the pairs of noise and sample of a run's best.pt are kept, known by its digest."""
    folder = study / "datasets" / "pairs" / reflow_from.rpartition(PINNED)[2][:16]
    return folder / "train.pt", folder / "val.pt"


def same_file(one: str, other: str) -> bool:
    """Whether two values of `--dataset` name the same data file, by whichever path."""
    try:
        return is_data_file(one) and is_data_file(other) and os.path.samefile(one, other)
    except OSError:
        return False


def check_dataset(dataset: str, study: Path, option: str) -> None:
    """Raise a DataError, which lists what there is, unless the dataset's files exist."""
    if is_data_file(dataset):
        path = Path(dataset)
        if not path.is_file():
            beside = {file.name for file in path.parent.glob("*.*") if is_data_file(file.name)}
            raise DataError(
                f"{option}: {_what_is_no_file(path)}{did_you_mean(path.name, beside - {path.name})}"
            )
        return
    train_file, val_file = split_files(study, dataset)
    if dataset in EMBEDDED and not train_file.exists():
        return
    missing = [str(file) for file in (train_file, val_file) if not file.is_file()]
    if missing and Path(dataset).is_file():
        raise DataError(f"{option}: found {dataset}, expected a .pt or .npy file")
    if missing:
        alike = [f"{dataset}{suffix}" for suffix in DATA_FILE_SUFFIXES]
        if files := [file for file in alike if Path(file).is_file()]:
            raise DataError(f"{option}: no dataset {dataset}; did you mean the file {files[0]}?")
        there = {*EMBEDDED, *(file.parent.name for file in train_file.parent.parent.glob("*/*.pt"))}
        raise DataError(
            f"{option} {dataset}: no {' and no '.join(missing)}; "
            f"{meant(dataset, there, 'datasets')}, or give the path of a .pt or .npy file"
        )


def _what_is_no_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder, expected a file"
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which is not there"
    return f"no file {path}"


def dataset_files(dataset: str, study: Path) -> dict[str, Path]:
    """The files of a dataset, `data` or `train` and `val`; none of an embedded one not yet made."""
    if is_data_file(dataset):
        return {"data": Path(dataset)}
    train_file, val_file = split_files(study, dataset)
    return {"train": train_file, "val": val_file} if train_file.exists() else {}


def row_shape(dataset: str, study: Path) -> tuple[int, ...] | None:
    """The shape of a row; None where it is not known without torch.

    Raises:
        DataError: A file of it can surely not be used.
    """
    files = dataset_files(dataset, study)
    if not files:
        return (64,) if dataset == DIGITS else (2,)
    shape = shape_of_file(next(iter(files.values())))
    return shape[1:] if shape else None


def training_rows(dataset: str, study: Path) -> int | None:
    """How many rows of a dataset are trained on; None where it is not known without torch.

    Raises:
        DataError: A file of it can surely not be used.
    """
    files = dataset_files(dataset, study)
    if not files:
        return DIGITS_ROWS - validation_rows(DIGITS_ROWS) if dataset == DIGITS else TOY_ROWS
    part, file = next(iter(files.items()))
    shape = shape_of_file(file)
    if shape is None:
        return None
    return trained_on(part, shape[0])


def trained_on(part: str, n: int) -> int:
    """How many of the n rows of a dataset's first part, as `dataset_files` has them, train."""
    return n - validation_rows(n) if part == "data" else n


def validation_rows(n: int) -> int:
    """How many of so many rows are for validation."""
    return max(1, round(VAL_SHARE * n))


def rows_per_step(batch_size: int, n: int, ranks: int) -> int:
    """How many rows a step takes, of all ranks together.

    Args:
        batch_size: What is asked for; with fewer rows, an epoch would have no step.
        n: Rows of the training data.
        ranks: How many processes share a batch.

    Raises:
        ConfigError: They cannot share it equally.
    """
    rows = min(batch_size, n)
    if rows % ranks:
        raise ConfigError(
            f"--batch-size: {rows} rows per step cannot be shared equally by {ranks} ranks"
        )
    return rows


def check_data(dataset: str, study: Path, option: str = "--dataset") -> None:
    """Raise a DataError for data that can surely not be trained on. Takes a second at most.

    What cannot be known without torch, or is in a part of a large file that is not looked at, is
    found where the run starts.
    """
    check_dataset(dataset, study, option)
    files = dataset_files(dataset, study)
    found = {part: layout for part, file in files.items() if (layout := check_file(file))}
    if "data" in found:
        check_rows(dataset, found["data"].shape[0])
    if found.keys() >= {"train", "val"}:
        shapes = {part: layout.shape[1:] for part, layout in found.items()}
        check_shapes(files["train"], shapes["train"], files["val"], shapes["val"])


def check_rows(dataset: str, n: int) -> None:
    """Raise a DataError unless a file has rows for a training and a validation part."""
    if n < 3:
        raise DataError(
            f"{dataset} has {counted(n, 'row')}, expected at least 3: one is for validation, "
            "and a single one has nothing to learn from"
        )


def check_shapes(
    train_file: Path, train_shape: tuple[int, ...], val_file: Path, val_shape: tuple[int, ...]
) -> None:
    """Raise a DataError unless the rows of both parts of a dataset are of one shape."""
    if train_shape != val_shape:
        raise DataError(
            f"{train_file} has rows of shape {train_shape}, {val_file} of shape {val_shape}: "
            "both must be of one shape"
        )


def check_source(
    source: str, shape: tuple[int, ...] | None, of_data: tuple[int, ...] | None
) -> None:
    """Raise a DataError where rows of `--source` are surely of another shape than the data."""
    if None not in (shape, of_data) and shape != of_data:
        raise DataError(
            f"--source {source} has rows of shape {shape}, expected {of_data}, as the data have"
        )


def content_of_dataset(dataset: str, study: Path) -> dict[str, DataContent | None]:
    """The content of each file of a dataset; None of one that cannot be read without torch."""
    return {part: _content(path) for part, path in dataset_files(dataset, study).items()}


def content_of_data(training: TrainingConfig, study: Path) -> dict[str, DataContent | None]:
    """The content of each file that a run trains on, as far as it is known without torch.

    Empty where its dataset is an embedded one that is not made yet.
    """
    found = content_of_dataset(training.dataset, study)
    if not found:
        return {}
    if training.source != "normal":
        of_source = content_of_dataset(training.source, study) or {"train": None, "val": None}
        found |= {f"{SOURCE}{part}": content for part, content in of_source.items()}
    if training.reflow_from:
        files = zip(("train", "val"), pair_files(study, training.reflow_from), strict=True)
        found |= {f"{PAIRS}{part}": _content(file) for part, file in files}
    return found


def _content(path: Path) -> DataContent | None:
    with contextlib.suppress(DataError):  # said where it is trained on
        with contextlib.suppress(OSError):
            found = path.stat()
            return _content_of(path, (found.st_ino, found.st_size, found.st_mtime_ns))
        return content_of_file(path)
    return None


@functools.lru_cache(maxsize=16)
def _content_of(path: Path, version: tuple[int, int, int]) -> DataContent | None:
    """Read once for all runs of a sweep; `version` tells a file from what it was before."""
    return content_of_file(path)


def differences(
    there: Mapping[str, DataContent], here: Mapping[str, DataContent | None]
) -> list[str]:
    """A line for each part of the data that differs; none of one whose content is not known."""
    if not there:
        return []
    lines = []
    for part in sorted(there.keys() | here.keys()):
        if part not in there or part not in here:
            lines.append(
                f"  {part}: {there.get(part, 'absent')} then, {here.get(part, 'absent')} now"
            )
        elif here[part] not in (None, there[part]):
            lines.append(f"  {part}: {there[part]} then, {here[part]} now")
    return lines
