"""Training a run for longer than was asked for at first: what is noted of it, and what is said."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.learning_rate import learning_rate_factor
from flowjobs.runs.metrics import epochs_without_improvement
from flowjobs.runs.status import RunStatus

Extension = dict[str, Any]


def extension_of(before: Mapping[str, Any], asked: TrainingConfig, step: int) -> Extension | None:
    """What a checkpoint of step `step` is extended by: {"step": 69, "epochs": [3, 6]}.

    Args:
        before: The training config in the checkpoint, or what is known of it.
        asked: The run's config now.
        step: Optimizer steps done.

    Returns:
        None if the run is as long as before.
    """
    now = {"epochs": asked.epochs, "patience": asked.patience}
    changed = {
        key: [before[key], value]
        for key, value in now.items()
        if before.get(key) not in (None, value)
    }
    return {"step": step, **changed} if changed else None


def explain_extension(
    name: str,
    before: TrainingConfig,
    asked: TrainingConfig,
    status: RunStatus,
    metrics_file: Path,
) -> str:
    """Notes to print on training the run `name` for longer; "" if it is as long.

    Raises:
        ConfigError: Its patience has run out, and more epochs alone would not train a step.
    """
    if why := out_of_patience(name, before, asked, status, metrics_file):
        raise ConfigError(why)
    longer = asked.epochs > before.epochs
    more_patience = asked.patience > before.patience
    notes = []
    if longer:
        notes.append(f"extends {name} from {before.epochs} to {asked.epochs} epochs")
        if rates := _rates(before, asked, status):
            notes[-1] += f": {rates}"
    if more_patience:
        notes.append(f"raises the patience of {name} from {before.patience} to {asked.patience}")
    return "\n".join(notes)


def out_of_patience(
    name: str,
    before: TrainingConfig,
    asked: TrainingConfig,
    status: RunStatus,
    metrics_file: Path,
) -> str:
    """Why the run `name` would not train a step of the epochs that it is given; "" if it would."""
    patience = max(before.patience, asked.patience)
    stopped_early = status.state == "finished" and status.epoch < before.epochs
    # It may run out in the very last epoch, or the run be killed before it says that it finished.
    if asked.epochs > before.epochs and (
        (stopped_early and patience == before.patience)
        or epochs_without_improvement(metrics_file) >= patience
    ):
        return (
            f"{name} ran out of patience, at epoch {status.epoch} of {before.epochs}: with "
            f"--epochs {asked.epochs} alone it would stop at once. Give it more --patience too "
            f"(it has {before.patience})"
        )
    return ""


def _rates(before: TrainingConfig, asked: TrainingConfig, status: RunStatus) -> str:
    """How the learning rate jumps where the schedule becomes longer."""
    if not status.total_steps or not status.epochs or not status.step:
        return ""
    steps_per_epoch = status.total_steps // status.epochs
    old, new = (
        config.lr
        * learning_rate_factor(status.step, config.warmup_steps, config.epochs * steps_per_epoch)
        for config in (before, asked)
    )
    if old == new:
        return "the learning rate then follows the longer schedule"
    return (
        f"at step {status.step} the learning rate goes from {old:.3g} back up to {new:.3g}, since "
        f"the cosine now ends at epoch {asked.epochs}; a run of {asked.epochs} epochs from the "
        "start would have another result"
    )
