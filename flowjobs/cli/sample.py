"""flowjobs sample."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.runs_named import RunName, existing_run
from flowjobs.config import DATA_FILE_SUFFIXES, MAX_SEED
from flowjobs.errors import ConfigError
from flowjobs.evaluation.solver import DEFAULT_STEPS, DEFAULT_TOLERANCE, Method, Solver
from flowjobs.runs.datasets import content_of_data, dataset_files, same_file
from flowjobs.runs.run import Run, check_is_file

if TYPE_CHECKING:
    from flowjobs.data.dataset import FlowDataset
    from flowjobs.evaluation.sampling import Samples
    from flowjobs.evaluation.trained import TrainedModel

SUFFIXES = (*DATA_FILE_SUFFIXES, ".png")
SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class Sample(InStudy):
    """Draw samples of a run's best checkpoint (EMA weights), in the data's own units.

    A sample follows from the seed and its index alone, to the last bit on the same hardware: the
    first 100 of 1,000 are the same as 100 drawn alone.
    """

    name: RunName
    """Name of the run."""

    out: tuple[Path, ...]
    """Where to: a .npy or .pt file of shape (n, dim), a .png to look at (the first 64 digits; or
    all as points over the data), or several of them."""

    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1000
    """How many samples."""

    solver: Method = "midpoint"
    """Solver of the ODE: of fixed steps with 1 (euler), 2 (midpoint, heun) or 4 (rk4) network calls
    each, or dopri5, which chooses its steps."""

    steps: int = DEFAULT_STEPS
    """Steps from noise to data; of no effect with dopri5."""

    tolerance: float = DEFAULT_TOLERANCE
    """Error that dopri5 allows in each step, relative and absolute."""

    seed: int = 0
    """Seed of the noise."""

    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one."""

    def run(self, defaults: Defaults) -> int:
        """Draw and write. Returns the exit code."""
        solver = Solver(self.solver, self.steps, self.tolerance)
        self._check()
        run = existing_run(self.study, self.name)
        self._check_keeps(run)
        with best_of(run, self.device) as trained:
            from flowjobs.evaluation.sampling import joined

            pictures = any(path.suffix == ".png" for path in self.out)
            reference = data_of(run)[1] if pictures else None
            started = time.monotonic()
            parts = trained.chunks(self.n, self.seed, solver)
            found = joined(list(_with_progress(parts, self.n)))
            seconds = time.monotonic() - started
        for path in self.out:
            _write(path, found, run, reference)
            print(f"samples   {path}")
        shape = " x ".join(str(size) for size in found.x_1.shape)
        print(f"drawn     {shape}, from step {trained.step} of {run.name}, seed {self.seed}")
        if (rows := trained.source.rows) is not None and rows < self.n:
            print(
                f"starts    {rows} held-out rows of --source {trained.config.source}, some more "
                "than once, and the samples with them"
            )
        print(f"solver    {solver}: {found.nfe:g} network calls (NFE) a sample, {seconds:.1f} s")
        return 0

    def _check(self) -> None:
        if self.n < 1:
            raise ConfigError(f"-n: found {self.n}, expected at least 1")
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(f"--seed: found {self.seed}, expected 0 to {MAX_SEED - 1}")
        if not self.out:
            raise ConfigError("--out: found no file, expected a .npy, .pt or .png file")
        for path in self.out:
            if path.suffix not in SUFFIXES:
                raise ConfigError(f"--out: found {path}, expected a .npy, .pt or .png file")
            # Before minutes are spent.
            if not path.parent.is_dir():
                raise ConfigError(f"--out {path}: there is no folder {path.parent}")
            check_is_file("--out", path)

    def _check_keeps(self, run: Run) -> None:
        """Raise where samples would replace what the run cannot be resumed or measured without."""
        training, needed = run.config().training, [run.best, run.last]
        for dataset in (training.dataset, training.source):
            needed += dataset_files(dataset, run.study).values()
        for path in self.out:
            if any(same_file(str(path), str(of)) for of in needed):
                raise ConfigError(
                    f"--out {path}: {run.name} needs this file, which samples would replace; "
                    "give another one"
                )


@contextmanager
def best_of(run: Run, device: str) -> Iterator["TrainedModel"]:
    """The model of a run's best.pt, as its own code builds it, and as many threads as help."""
    # Read when torch is loaded: a thread that waits leaves its core to the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from flowjobs.runs.code import import_from_snapshot
    from flowjobs.training.trained import load_trained

    import_from_snapshot(run)
    trained = load_trained(run, device)
    with trained.on_its_threads():
        yield trained


def data_of(run: Run) -> "tuple[FlowDataset, FlowDataset]":
    """The training and the validation part that a run's config names.

    Raises:
        DataError: They cannot be read, or the run was trained on others: they have changed since,
            or a script gave its trainer data of its own.
    """
    from flowjobs.data.dataset import load_datasets

    config = run.config().training
    data = load_datasets(config.dataset, run.study)
    run.check_data(content_of_data(config, run.study))
    return data


def _with_progress(parts: "Iterable[Samples]", n: int) -> "Iterable[Samples]":
    """The same, saying now and then how many there are."""
    done, said_at = 0, time.monotonic()
    for part in parts:
        done += len(part)
        if time.monotonic() - said_at > SAY_EVERY_S:
            said_at = time.monotonic()
            print(f"{done} of {n} samples", file=sys.stderr)
        yield part


def _write(path: Path, samples: "Samples", run: Run, reference: "FlowDataset | None") -> None:
    import numpy as np
    import torch

    from flowjobs.evaluation.pictures import draw_samples
    from flowjobs.runs.files import replaced_whole

    match path.suffix:
        case ".png":
            assert reference is not None
            dataset = run.config().training.dataset
            draw_samples(path, dataset, samples.x_1, lambda: reference[:500])
        case ".npy":
            with replaced_whole(path) as file:
                np.save(file, samples.x_1.numpy())
        case _:
            with replaced_whole(path) as file:
                torch.save(samples.x_1, file)
