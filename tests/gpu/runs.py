"""Small runs of this process, whole and in parts, and whether they ended with the same bits."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import RunInterrupted
from flowjobs.models.build import build_model
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training import FlowDataset
from flowjobs.training.pinned import with_pinned_files
from flowjobs.training.ranks import Ranks
from flowjobs.training.same_bits import differences
from flowjobs.training.trainer import Trainer

DIM = 16
STEPS_PER_EPOCH = 10
# Small, and long enough that most steps come after those that are not captured.
CONFIG = TrainingConfig(
    epochs=8, batch_size=32, lr=3e-3, warmup_steps=5, ema_decay=0.9, width=64, depth=1
)
STEPS = CONFIG.epochs * STEPS_PER_EPOCH
# In the middle of an epoch, at its end, and one step after another interruption.
INTERRUPTED_AT = (17, 40, 41, 66)


def two_clusters(n: int, seed: int) -> torch.Tensor:
    """Rows around two points, which are learned within some steps."""
    generator = torch.Generator().manual_seed(seed)
    side = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
    return side + 0.2 * torch.randn(n, DIM, generator=generator)


def train(
    run: Run,
    config: TrainingConfig,
    device: torch.device,
    leave_at: Sequence[int] = (),
    ranks: Ranks | None = None,
) -> Trainer:
    """One attempt, to the end or to the first of these steps that is still to come.

    Raises:
        RunInterrupted: It has left.
    """
    config = with_pinned_files(config, run.study, None, data_are_given=True)
    if ranks is None or ranks.is_first:
        asked = RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled"))
        run.create(asked, data_are_given=True)
        held: Any = recording(run, JobInfo.in_foreground())
    else:
        held = nullcontext()
    if config.compile:
        torch.compiler.reset()  # a new process has compiled nothing yet
    begun: list[Trainer] = []
    with held as recorder:
        trainer = Trainer(
            build_model(config, DIM),
            config,
            FlowDataset(two_clusters(config.batch_size * STEPS_PER_EPOCH + 3, seed=1)),
            FlowDataset(two_clusters(100, seed=2)),
            device,
            run=run,
            recorder=recorder,
            ranks=ranks,
            stop_reason=lambda: "test" if begun and begun[0].state.step in leave_at else None,
        )
        begun.append(trainer)
        trainer.train()
    return trainer


def train_in_parts(
    run: Run,
    config: TrainingConfig,
    device: torch.device,
    leave_at: Sequence[int] = INTERRUPTED_AT,
    ranks: Ranks | None = None,
) -> None:
    """The same with an interruption at each of these steps."""
    for number in range(len(leave_at)):
        with suppress(RunInterrupted):
            train(run, config, device, leave_at[number:], ranks)
    train(run, config, device, ranks=ranks)


def assert_interrupted(run: Run, times: int) -> None:
    """Whether each attempt went on where the one before it had left."""
    attempts = run.status().attempts
    assert len(attempts) == times + 1
    assert [after.first_step for after in attempts[1:]] == [
        before.last_step for before in attempts[:-1]
    ]


def assert_same_bits(first: Run, second: Run) -> None:
    """Whether two runs ended with the same bits, of whatever the configs say in other words."""
    parts = [part for part in differences(first, second) if not part.endswith(": config")]
    assert parts == []


def train_in_three_ways(study: Path, config: TrainingConfig, device: torch.device) -> Trainer:
    """Train a run whole, another in plain steps, one in parts: all must end with the same bits.

    Returns:
        The trainer of the first, of the run "whole".
    """
    whole, plain, parts = (Run(study, name) for name in ("whole", "plain", "parts"))
    trained = train(whole, config, device)
    assert not train(plain, replace(config, cuda_graph=False), device).captured
    assert_same_bits(whole, plain)
    train_in_parts(parts, config, device)
    assert_interrupted(parts, len(INTERRUPTED_AT))
    assert_same_bits(whole, parts)
    return trained


def with_source(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a config, with rows in the file that they may name as the source."""
    if "source" not in options:
        return options
    rows = Path(options["source"]).absolute()
    torch.save(torch.randn(400, DIM, generator=torch.Generator().manual_seed(0)), rows)
    return options | {"source": str(rows)}


def val_losses(run: Run) -> list[float]:
    """After each epoch."""
    return [row["val/loss"] for row in read_rows(run.metrics_file) if "val/loss" in row]
