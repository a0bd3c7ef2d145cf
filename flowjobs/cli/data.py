"""flowjobs data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.parser import Flag
from flowjobs.config import OptionalStr
from flowjobs.errors import ConfigError
from flowjobs.formatting import parse_count
from flowjobs.runs.datasets import split_files
from flowjobs.runs.run import absolute, check_run_name


@dataclass(frozen=True)
class Data(InStudy):
    """Make the splits of a dataset from one file of embeddings."""

    action: tyro.conf.Positional[Literal["split"]]
    """split: write STUDY/datasets/splits/SIZE/{train,val}.pt, 15 % of the rows for validation."""

    file: tyro.conf.Positional[Path]
    """A .pt or .npy file of floats, shape (n, dim)."""

    sizes: tuple[str, ...] = ("all",)
    """Training rows of each split (1k 5k 10k), or all. A smaller one is part of a larger one; all
    share one validation part."""

    name: OptionalStr = None
    """What the splits are called, with their size: NAME-SIZE; default: SIZE alone."""

    overwrite: Flag = False
    """Replace splits of these names that hold other rows."""

    def run(self, defaults: Defaults) -> int:
        """Write the splits. Returns the exit code."""
        if not self.sizes:
            raise ConfigError("--sizes: found no value, expected one or more (1k 5k all)")
        prefix = "" if self.name is None else f"{self.name}-"
        sizes = {f"{prefix}{size}": _rows(size) for size in self.sizes}
        for name in sizes:
            check_run_name(name)
        from flowjobs.data.dataset import FlowDataset, split, write_splits

        study, whole = absolute(self.study), FlowDataset(self.file)
        written = write_splits(whole, study, sizes, overwrite=self.overwrite)
        for name, rows in written.items():
            print(f"{split_files(study, name)[0]}: {rows} training rows of width {whole.dim}")
        kept = f"the same {len(split(whole)[1])} of {len(whole)} rows (width {whole.dim})"
        print(f"validation: {kept} in each val.pt; train with --dataset {next(iter(written))}")
        return 0


def _rows(size: str) -> int | None:
    """`1k` -> 1000; None for `all`."""
    if size == "all":
        return None
    if (rows := parse_count(size)) is None:
        raise ConfigError(
            f"--sizes: found {size!r}, expected a number of rows (500, 5k, 1m) or all"
        )
    return rows
