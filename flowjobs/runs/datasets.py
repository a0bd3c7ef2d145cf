"""Where a dataset is on disk. Reads no data, so that `submit` can check a name without torch."""

import os
from pathlib import Path

from flowjobs.config import is_data_file
from flowjobs.errors import DataError
from flowjobs.nearest import did_you_mean, meant

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
