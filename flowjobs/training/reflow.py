"""The pairs that --flow reflow trains on: noise, and the sample that a finished run makes of it.

Made once for each best.pt, from as many starts as the run's data have rows, and kept by its digest
under the study's datasets; normalized, as the models see them.

Source: Liu et al., Flow straight and fast (https://arxiv.org/abs/2209.03003), algorithm 1.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from flowjobs.config import PINNED, TrainingConfig
from flowjobs.data.batches import normalized
from flowjobs.data.dataset import FlowDataset, is_same_normalization
from flowjobs.data.randomness import derive_seed
from flowjobs.data.tensor_file import write_tensor
from flowjobs.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    RunInterrupted,
)
from flowjobs.evaluation.solver import Solver
from flowjobs.evaluation.trained import TrainedModel
from flowjobs.runs.data_file import DataContent
from flowjobs.runs.datasets import pair_files
from flowjobs.runs.file_lock import locked
from flowjobs.runs.run import Run
from flowjobs.training.pinned import check_same_data
from flowjobs.training.seal import digest_of
from flowjobs.training.trained import load_trained

logger = logging.getLogger(__name__)

SOLVER = Solver("midpoint", steps=50)
# Whoever makes them for another run at the same time.
WAIT_S = 3600.0


def pairs_of(
    config: TrainingConfig,
    study: Path,
    sizes: tuple[int, int],
    stats: dict[str, Tensor],
    content: Mapping[str, DataContent],
    device: torch.device,
    stop_reason: Callable[[], str | None],
) -> tuple[FlowDataset, FlowDataset]:
    """The training and the validation pairs of `--reflow-from`, rows of shape (2, *shape).

    Args:
        config: Names the run, and the digest of its best.pt.
        study: Where the run is, and the pairs are kept.
        sizes: How many of each to make.
        stats: Normalization of this run's data, which must be the other's.
        content: Of this run's data and source, by part, which must be the other's.
        device: Where to compute.
        stop_reason: Asked between chunks; a text raises RunInterrupted.

    Raises:
        CheckpointMismatchError: They are not made yet, and the best.pt is another than it was.
        ConfigError: The other run is of other data.
    """
    assert config.reflow_from is not None
    train_file, val_file = pair_files(study, config.reflow_from)
    name, _, digest = config.reflow_from.rpartition(PINNED)
    teacher_run = Run(study, name)
    # A best.pt that is gone, or another by now, does not say which data the pairs are of; those of
    # a run that has begun are known.
    with suppress(OSError, CheckpointError):
        if digest_of(teacher_run.best) == digest:
            check_same_data(teacher_run, content)
    if not train_file.exists():
        train_file.parent.mkdir(parents=True, exist_ok=True)
        with locked(train_file.parent / ".lock", WAIT_S, f"for the pairs of {name}"):
            if not train_file.exists():
                teacher = _teacher(teacher_run, digest, stats, device)
                # The validation part first: where train.pt is, both are.
                for file, n in zip((val_file, train_file), reversed(sizes), strict=True):
                    logger.info("makes %d pairs of %s: %s", n, name, file)
                    shape = (n, 2, *stats["mean"].shape)
                    rows = _pairs(teacher, n, derive_seed("pairs", file.stem), stop_reason)
                    write_tensor(file, shape, torch.float32, rows)
    return FlowDataset(train_file), FlowDataset(val_file)


def _teacher(run: Run, digest: str, stats: dict[str, Tensor], device: torch.device) -> TrainedModel:
    trained = load_trained(run, device)
    if digest_of(run.best) != digest:
        raise CheckpointMismatchError(
            f"--reflow-from {run.name}: {run.best} is another file than when the run was made; "
            "restore it, or give the run another --name"
        )
    if not is_same_normalization(trained.stats, stats):
        raise ConfigError(
            f"--reflow-from {run.name}: it was trained on other data, expected those of this run"
        )
    return trained


def _pairs(
    teacher: TrainedModel, n: int, seed: int, stop_reason: Callable[[], str | None]
) -> Iterator[Tensor]:
    mean, std = (teacher.stats[key].cpu() for key in ("mean", "std"))
    for made in teacher.chunks(n, seed, SOLVER):
        if reason := stop_reason():
            raise RunInterrupted(reason)
        yield torch.stack([made.x_0, normalized(made.x_1, mean, std)], dim=1)
