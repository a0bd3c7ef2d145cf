"""Where a dataset is on disk. Reads no data, so that `submit` can check a name without torch."""

from pathlib import Path

from flowjobs.config import is_data_file
from flowjobs.errors import DataError

EMBEDDED = "digits"


def split_files(study: Path, dataset: str) -> tuple[Path, Path]:
    """`STUDY/datasets/splits/NAME/train.pt` and `val.pt`."""
    folder = study / "datasets" / "splits" / dataset
    return folder / "train.pt", folder / "val.pt"


def check_dataset(dataset: str, study: Path) -> None:
    """Raise a DataError, which lists what there is, unless the dataset's files exist."""
    if is_data_file(dataset):
        if not Path(dataset).is_file():
            raise DataError(f"--dataset: no file {dataset}")
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
            f"--dataset {dataset}: no {' and no '.join(missing)}; there are "
            f"{', '.join(sorted(there))}, or give the path of a .pt or .npy file"
        )
