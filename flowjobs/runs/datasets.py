"""Where a dataset is on disk and what it holds, without torch, so that `submit` can check it."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from flowjobs.config import is_data_file
from flowjobs.errors import DataError
from flowjobs.nearest import did_you_mean, meant
from flowjobs.runs.data_file import DataContent, check_file, content_of_file

EMBEDDED = "digits"


def split_files(study: Path, dataset: str) -> tuple[Path, Path]:
    """`STUDY/datasets/splits/NAME/train.pt` and `val.pt`."""
    folder = study / "datasets" / "splits" / dataset
    return folder / "train.pt", folder / "val.pt"


def same_file(one: str, other: str) -> bool:
    """Whether two values of `--dataset` name the same data file, by whichever path."""
    try:
        return is_data_file(one) and is_data_file(other) and os.path.samefile(one, other)
    except OSError:
        return False


def check_dataset(dataset: str, study: Path) -> None:
    """Raise a DataError, which lists what there is, unless the dataset's files exist."""
    if is_data_file(dataset):
        path = Path(dataset)
        if not path.is_file():
            beside = {file.name for file in path.parent.glob("*.*") if is_data_file(file.name)}
            raise DataError(f"--dataset: no file {dataset}{did_you_mean(path.name, beside)}")
        return
    train_file, val_file = split_files(study, dataset)
    if dataset == EMBEDDED and not train_file.exists():
        return
    missing = [str(file) for file in (train_file, val_file) if not file.is_file()]
    if missing and Path(dataset).is_file():
        raise DataError(f"--dataset: found {dataset}, expected a .pt or .npy file")
    if missing:
        there = {EMBEDDED, *(file.parent.name for file in train_file.parent.parent.glob("*/*.pt"))}
        raise DataError(
            f"--dataset {dataset}: no {' and no '.join(missing)}; "
            f"{meant(dataset, there, 'datasets')}, or give the path of a .pt or .npy file"
        )


def dataset_files(dataset: str, study: Path) -> dict[str, Path]:
    """The files of a dataset, `data` or `train` and `val`; none if the embedded one is not made."""
    if is_data_file(dataset):
        return {"data": Path(dataset)}
    train_file, val_file = split_files(study, dataset)
    return {"train": train_file, "val": val_file} if train_file.exists() else {}


def check_data(dataset: str, study: Path) -> None:
    """Raise a DataError for data that can surely not be trained on. Takes a second at most.

    What cannot be known without torch, or is in a part of a large file that is not looked at, is
    found where the run starts.
    """
    check_dataset(dataset, study)
    files = dataset_files(dataset, study)
    found = {part: layout for part, file in files.items() if (layout := check_file(file))}
    if "data" in found:
        check_rows(dataset, found["data"].shape[0])
    if found.keys() >= {"train", "val"}:
        check_widths(files["train"], found["train"].shape[1], files["val"], found["val"].shape[1])


def check_rows(dataset: str, n: int) -> None:
    """Raise a DataError unless a file has rows for a training and a validation part."""
    if n < 2:
        raise DataError(f"{dataset} has one row, expected at least 2: some are for validation")


def check_widths(train_file: Path, train_dim: int, val_file: Path, val_dim: int) -> None:
    """Raise a DataError unless both parts of a dataset are of one width."""
    if train_dim != val_dim:
        raise DataError(
            f"{train_file} has width {train_dim}, {val_file} has width {val_dim}: "
            "both must be of one width"
        )


def content_of_dataset(dataset: str, study: Path) -> dict[str, DataContent | None]:
    """The content of each file of a dataset; None of one that cannot be read without torch."""
    found: dict[str, DataContent | None] = {}
    for part, path in dataset_files(dataset, study).items():
        found[part] = None
        with contextlib.suppress(DataError):  # said where it is trained on
            found[part] = content_of_file(path)
    return found


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
