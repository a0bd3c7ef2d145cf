"""The pairs that --flow reflow trains on: noise, and the sample that a finished run makes of it.

Made once for each best.pt, from as many starts as the run's data have rows, and kept by its digest
under the study's datasets; normalized, as the models see them.

Source: Liu et al., Flow straight and fast (https://arxiv.org/abs/2209.03003), algorithm 1.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowjobs.config import PINNED, TrainingConfig
from flowjobs.data.batches import normalized
from flowjobs.data.dataset import FlowDataset, is_same_normalization
from flowjobs.data.randomness import derive_seed
from flowjobs.data.source import Sources
from flowjobs.data.tensor_file import write_tensor
from flowjobs.default_logging import default_logging
from flowjobs.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
)
from flowjobs.evaluation.sampling import CHUNK
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
# Without one more pair of whoever makes them for another run at the same time.
WAIT_S = 3600.0
SAY_EVERY_S = 60.0


def pairs_of(
    config: TrainingConfig,
    study: Path,
    sizes: tuple[int, int],
    stats: dict[str, Tensor],
    sources: Sources,
    content: Mapping[str, DataContent],
    device: torch.device,
    check: Callable[[], None],
    made: Callable[[], None],
) -> tuple[FlowDataset, FlowDataset]:
    """The training and the validation pairs of `--reflow-from`, rows of shape (2, *shape).

    Args:
        config: Names the run, and the digest of its best.pt.
        study: Where the run is, and the pairs are kept.
        sizes: How many of each to make.
        stats: Normalization of this run's data, which must be the other's.
        sources: Where the pairs start: each part at rows of its own.
        content: What this run's data and source hold, by part, which must be the other's.
        device: Where to compute.
        check: Called between network calls, and while another run makes them; what it raises ends
            it, and what is made is kept.
        made: Called when there are more than before.

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
        files = train_file, val_file
        there = sum(map(_size_of_partial, files))

        def look() -> bool:
            """Whether there are more than before, which another run makes."""
            nonlocal there
            check()
            before, there = there, sum(map(_size_of_partial, files))
            if there > before:
                made()
            return there > before

        with locked(train_file.parent / ".lock", WAIT_S, f"for the pairs of {name}", look):
            if not train_file.exists():
                teacher = _teacher(teacher_run, digest, stats, device)
                # The validation part first: where train.pt is, both are.
                parts = (
                    (val_file, sizes[1], sources.held_out),
                    (train_file, sizes[0], sources.training),
                )
                with teacher.on_its_threads():
                    for file, n, source in parts:
                        if not file.exists():
                            _make(file, n, replace(teacher, source=source), check, made)
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


def _make(
    file: Path, n: int, teacher: TrainedModel, check: Callable[[], None], made: Callable[[], None]
) -> None:
    """Write n pairs of a teacher to a file, a chunk at a time: an interruption costs no other."""
    mean, std = (teacher.stats[key].cpu() for key in ("mean", "std"))
    shape = (2, *mean.shape)
    row_bytes = 4 * math.prod(shape)  # of float32
    partial = _partial(file)
    partial.touch()
    # A chunk follows from the seed and its number: it does not matter who made those before it, nor
    # (where there are no locks) whether two make it.
    try:
        with partial.open("r+b") as rows, default_logging():
            first = partial.stat().st_size // (CHUNK * row_bytes)
            logger.info("makes %d pairs of %s, from %d: %s", n, teacher.name, first * CHUNK, file)
            rows.seek(first * CHUNK * row_bytes)
            seed, say_at = derive_seed("pairs", file.stem), time.monotonic() + SAY_EVERY_S
            for chunk in teacher.chunks(n, seed, SOLVER, check=check, first=first):
                pairs = torch.stack([chunk.x_0, normalized(chunk.x_1, mean, std)], dim=1)
                rows.write(pairs.numpy().data)
                rows.flush()
                os.fsync(rows.fileno())
                made()
                if time.monotonic() > say_at:
                    logger.info("%d of %d pairs are made", rows.tell() // row_bytes, n)
                    say_at = time.monotonic() + SAY_EVERY_S

            def all_rows() -> Iterator[Tensor]:
                rows.seek(0)
                while block := bytearray(rows.read(CHUNK * row_bytes)):
                    check()
                    yield torch.frombuffer(block, dtype=torch.float32).view(-1, *shape)

            write_tensor(file, (n, *shape), torch.float32, all_rows())
    except OSError as error:
        error.filename = error.filename or str(partial)  # of a full disk, Python does not tell
        raise
    partial.unlink(missing_ok=True)


def _partial(file: Path) -> Path:
    """The pairs of a file that are made, one after another, as long as not all are."""
    return file.with_suffix(".partial")


def _size_of_partial(file: Path) -> int:
    """In bytes; 0 if there is none."""
    with suppress(FileNotFoundError):
        return _partial(file).stat().st_size
    return 0
