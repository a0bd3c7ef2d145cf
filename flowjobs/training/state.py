"""All that changes while a run trains, and its way into a checkpoint and back."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowjobs.config import TrainingConfig
from flowjobs.errors import CheckpointMismatchError
from flowjobs.runs.data_file import DataContent
from flowjobs.runs.datasets import differences
from flowjobs.training.checkpoint import Payload, checkpoint_payload, restore_payload
from flowjobs.training.ema import EMAModel
from flowjobs.training.optimizer import LightAdamW
from flowjobs.training.schedule import get_cosine_schedule_with_warmup


class TrainState:
    """Weights, average, optimizer, schedule and counters of a run.

    Random numbers are not among them: they follow from the seed and the step.

    Args:
        model: The model, on its device.
        config: What is trained.
        steps_per_epoch: Optimizer steps of an epoch.
        stats: Normalization of the data: `mean` and `std`, each of shape (dim,).
        data: The content of each part of the data.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        steps_per_epoch: int,
        stats: dict[str, Tensor],
        data: Mapping[str, DataContent],
    ) -> None:
        self.model = model
        self.ema = EMAModel(model, config.ema_decay)
        # A parameter of integers or complex numbers is not trained, and the fused kernel has none.
        weights = [weights for weights in model.parameters() if weights.is_floating_point()]
        self.optimizer = LightAdamW(
            weights, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.total_steps = config.epochs * steps_per_epoch
        self.scheduler = get_cosine_schedule_with_warmup(
            self.optimizer, config.warmup_steps, self.total_steps
        )
        self.step = 0
        self.best_loss = math.inf
        self.epochs_without_improvement = 0
        self.resumed_from = ""
        self.computed_with: dict[str, Any] = {}
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._stats = stats
        self._data = data

    @property
    def epochs_finished(self) -> int:
        """Whole epochs done."""
        return self.step // self._steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step was an epoch's last."""
        return self.step > 0 and self.step % self._steps_per_epoch == 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience has run out."""
        return (
            self.step >= self.total_steps
            or self.epochs_without_improvement >= self._config.patience
        )

    def note_val_loss(self, val_loss: float) -> bool:
        """Count an epoch's validation loss; True if it is the best so far."""
        if val_loss < self.best_loss:
            self.best_loss = val_loss
            self.epochs_without_improvement = 0
            return True
        self.epochs_without_improvement += 1
        return False

    def payload(self) -> Payload:
        """What a checkpoint holds; the tensors are the live ones."""
        payload = checkpoint_payload(
            epoch=self.epochs_finished - 1,
            step=self.step,
            model=self.model,
            ema=self.ema,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            best_loss=self.best_loss,
            epochs_without_improvement=self.epochs_without_improvement,
            resumed_from=self.resumed_from,
            computed_with=self.computed_with,
            config=self._config.to_dict(),
            stats=self._stats,
        )
        payload["data"] = {part: asdict(content) for part, content in self._data.items()}
        return payload

    def check(self, payload: Payload, path: Path) -> None:
        """Raise unless the run can go on from a payload; `path` is for the error's text.

        Raises:
            CheckpointMismatchError: Another model, or other data under the same name.
        """
        data = {part: DataContent(**found) for part, found in payload.get("data", {}).items()}
        if changed := differences(data, self._data):
            raise CheckpointMismatchError(
                "\n".join(
                    [
                        f"{path} was trained on other data than {self._config.dataset} holds now:",
                        *changed,
                        "restore them, or give the run another --name",
                    ]
                )
            )
        there = payload.get("normalization_stats", {})
        for key, found in self._stats.items():
            if key not in there or not torch.equal(there[key].cpu(), found.cpu()):
                raise CheckpointMismatchError(
                    f"{path} was trained on data with another {key}: the dataset "
                    f"{self._config.dataset} has changed since; restore it, or give the run "
                    "another --name"
                )
        weights, own = payload["model_state_dict"], self.model.state_dict()
        for key in sorted(weights.keys() | own.keys()):
            shapes = [_shape(part[key]) if key in part else "absent" for part in (weights, own)]
            if shapes[0] != shapes[1]:
                raise CheckpointMismatchError(
                    f"{path} is of another model than the config asks for ({key}: {shapes[0]} "
                    f"there, {shapes[1]} here): give the run another --name, or restore the "
                    "arguments it was started with"
                )

    def restore(self, payload: Payload, path: Path) -> None:
        """Take over a checkpoint's state; `path` is for the error's text.

        Raises:
            CheckpointMismatchError: Another model, or other data under the same name.
        """
        self.check(payload, path)
        restore_payload(payload, path, self.model, self.ema, self.optimizer, self.scheduler)
        # The schedule may have become longer since; the optimizer's rate is still the old one's.
        rates = self.scheduler.base_lrs, self.scheduler.lr_lambdas, self.optimizer.param_groups
        for base_rate, factor, group in zip(*rates, strict=True):
            group["lr"] = base_rate * factor(self.scheduler.last_epoch)
        self.step = payload["step"]
        self.best_loss = payload["best_loss"]
        self.epochs_without_improvement = payload["epochs_without_improvement"]
        self.resumed_from = payload["resumed_from"]
        self.computed_with = payload.get("computed_with", {})


def _shape(value: object) -> str:
    # A module's extra state may be anything.
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
