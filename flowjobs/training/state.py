"""All that changes while a run trains, and its way into a checkpoint and back."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowjobs.config import TrainingConfig, not_said, signature_differences
from flowjobs.data.dataset import is_same_normalization
from flowjobs.errors import (
    CheckpointMismatchError,
    CheckpointNotFiniteError,
    CheckpointUnloadableError,
    ConfigError,
    TrainingDivergedError,
)
from flowjobs.field_values import flag
from flowjobs.models.build import COMPILED, uncompiled
from flowjobs.runs.data_file import DataContent
from flowjobs.runs.datasets import differences
from flowjobs.runs.extending import Extension, extension_of
from flowjobs.training.checkpoint import Payload, checkpoint_payload, restore_payload
from flowjobs.training.ema import EMAModel
from flowjobs.training.optimizer import LightAdamW, step_at
from flowjobs.training.schedule import get_cosine_schedule_with_warmup

logger = logging.getLogger(__name__)


# Steps whose rates are brought to a GPU together.
RATES_AT_ONCE = 256
INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


class TrainState:
    """Weights, average, optimizer, schedule and counters of a run.

    Random numbers are not among them: they follow from the seed and the step.

    Args:
        model: The model, on its device.
        config: What is trained.
        steps_per_epoch: Optimizer steps of an epoch.
        stats: Normalization of the data: `mean` and `std`, each of shape (dim,).
        data: The content of each part of the data.

    Attributes:
        held: A payload that later ones reuse; see `hold_tensors`.
        unvalidated: Between an epoch's last step and the end of its validation, what that step has
            to log; a run that was saved there validates first. Else None.
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
        self._device = weights[0].device
        self._rates = (0, torch.empty(0, 2))
        self.step = 0
        self.best_loss = math.inf
        self.epochs_without_improvement = 0
        self.unvalidated: dict[str, float] | None = None
        self.held: Payload | None = None
        self.resumed_from = ""
        self.computed_with: dict[str, Any] = {}
        self.extensions: list[Extension] = []
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._stats = stats
        self._data = data
        self._trainable = [name for name, part in model.named_parameters() if part.requires_grad]
        self._shapes_as_built = _shapes(model.state_dict())
        self._types_as_built = _types(model.state_dict())
        self._types_may_differ = False

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
        """Whether all steps are done and validated, or patience has run out."""
        return self.unvalidated is None and (
            self.step >= self.total_steps
            or self.epochs_without_improvement >= self._config.patience
        )

    def changing(self) -> list[Tensor]:
        """All tensors that a step changes, each once."""
        of_models = [
            of
            for model in (self.model, self.ema.model)
            for of in (*model.parameters(), *model.buffers())
        ]
        moments = [of for moments in self.optimizer.state.values() for of in moments.values()]
        return [*{id(of): of for of in (*of_models, *moments)}.values()]

    def rates(self) -> Tensor | None:
        """On a GPU, this step's learning rate and its share in the average, of shape (2,) there.

        Those of some steps are brought there at once, and a step takes a view.
        """
        if self._device.type != "cuda":
            return None
        first, rates = self._rates
        if not first <= self.step < first + len(rates):
            first = self.step
            coming = [
                (self._learning_rate(first + ahead), self.ema.share_of(self.ema.updates + ahead))
                for ahead in range(RATES_AT_ONCE)
            ]
            pinned = torch.tensor(coming, dtype=torch.float32, device="cpu").pin_memory()
            rates = pinned.to(self._device, non_blocking=True)
            self._rates = first, rates
        return rates[self.step - first]

    def _learning_rate(self, step: int) -> float:
        (base_rate,), (factor,) = self.scheduler.base_lrs, self.scheduler.lr_lambdas
        return float(base_rate * factor(step))

    def update(self, scale: Tensor, rates: Tensor | None) -> None:
        """The optimizer's step and the average after it.

        Args:
            scale: What the gradients are divided by, of shape ().
            rates: See `rates`.
        """
        # The fused optimizer divides by this as it reads the gradients, as it does for GradScaler:
        # clipping them first would be one more pass over all of them, 4 % of a step. It reads a
        # float32, whatever the gradients are of.
        self.optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]
        if rates is None:
            self.optimizer.step()
            self.ema.average(self.model, self.ema.share_of(self.ema.updates))
        else:
            learning_rate, share = rates
            step_at(self.optimizer, learning_rate)
            self.ema.average(self.model, share)

    def end_step(self) -> None:
        """Count a step whose update is done."""
        self.scheduler.step()
        self.ema.updates += 1
        self.step += 1

    def note_val_loss(self, val_loss: float) -> bool:
        """Count an epoch's validation loss; True if it is the best so far."""
        self.unvalidated = None
        if val_loss < self.best_loss:
            self.best_loss = val_loss
            self.epochs_without_improvement = 0
            return True
        self.epochs_without_improvement += 1
        return False

    def take_extra_state(self) -> None:
        """Give the average what the model keeps beside its tensors, before it is used or saved.

        Raises:
            CheckpointUnloadableError: The model does not take its own state.
        """
        try:
            self.ema.take_extra_state()
        except Exception as error:
            raise _not_taken_back(error) from error

    def payload(self) -> Payload:
        """What a checkpoint holds, with the live tensors; on a CPU, slices are copied.

        Raises:
            CheckpointUnloadableError: The model does not take its own state.
        """
        if self.held:
            return self._held_payload(self.held)
        self.take_extra_state()
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
            extensions=self.extensions,
            config=self._config.to_dict(),
            stats=self._stats,
        )
        payload["unvalidated"] = self.unvalidated
        if self._types_may_differ:
            payload["types_may_differ"] = True
        payload["data"] = {part: asdict(content) for part, content in self._data.items()}
        return payload

    def hold_tensors(self) -> None:
        """Give payloads of the same dicts from here on: the tensors in them stay the same.

        Not where a module says of itself more than its tensors, or says other ones.
        """
        if self.held:
            return
        payload = self.payload()
        live = {of.data_ptr() for of in self.changing()}
        said = [of for key in ("model_state_dict", "ema_shadow") for of in payload[key].values()]
        if all(isinstance(of, Tensor) and of.data_ptr() in live for of in said):
            self.held = payload

    def _held_payload(self, held: Payload) -> Payload:
        optimizer = held["optimizer_state_dict"]
        groups = zip(optimizer["param_groups"], self.optimizer.param_groups, strict=True)
        return held | {
            "epoch": self.epochs_finished - 1,
            "step": self.step,
            "ema_updates": self.ema.updates,
            "optimizer_state_dict": optimizer
            | {"param_groups": [said | {"lr": group["lr"]} for said, group in groups]},
            "scheduler_state_dict": self.scheduler.state_dict(),
            "best_loss": self.best_loss,
            "epochs_without_improvement": self.epochs_without_improvement,
            "unvalidated": self.unvalidated,
        }

    def check(self, payload: Payload, path: Path) -> None:
        """Raise unless the run can resume from a payload; `path` is for the error's text.

        Raises:
            CheckpointNotFiniteError: Training had diverged when it was saved.
            CheckpointMismatchError: Another config, other data under the same name, or another
                model.
        """
        if name := self._not_finite(payload):
            raise CheckpointNotFiniteError(f"{path} holds values of {name} that are not finite")
        if changed := signature_differences(payload["config"], self._config.to_dict()):
            raise CheckpointMismatchError(
                "\n".join([f"{path} was trained with another config:", *changed])
            )
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
        if not is_same_normalization(there, self._stats):
            raise CheckpointMismatchError(
                f"{path} was trained on data with another mean or deviation: the dataset "
                f"{self._config.dataset} has changed since; restore it, or give the run another "
                "--name"
            )
        self._check_shapes(payload["model_state_dict"], path)

    def check_given(self, payload: Payload, path: Path) -> None:
        """Raise unless a file that anyone may have written is surely of this config.

        Raises:
            CheckpointMismatchError: Its config leaves out what decides the result, or is not what
                its optimizer and schedule were made with, as these are taken over; or it has more
                epochs, or has run out of patience.
        """
        if missing := not_said(payload["config"]):
            raise CheckpointMismatchError(
                f"{path} does not say its {', '.join(missing)}: the result would depend on what "
                "they were"
            )
        found = {
            "lr": payload["scheduler_state_dict"].get("base_lrs", []),
            "weight_decay": [
                group.get("weight_decay")
                for group in payload["optimizer_state_dict"].get("param_groups", [])
            ],
        }
        if changed := [
            f"  {flag(key)}: {value} there, {asked} asked for"
            for key, values in found.items()
            for value in values
            if value != (asked := getattr(self._config, key))
        ]:
            raise CheckpointMismatchError(
                "\n".join([f"{path} is not as its config says:", *changed])
            )
        self._check_length(payload, path)

    def _check_length(self, payload: Payload, path: Path) -> None:
        asked = self._config
        epochs = payload["config"].get("epochs", asked.epochs)
        patience = payload["config"].get("patience", asked.patience)
        if epochs > asked.epochs:  # its learning rate is another at each step
            raise CheckpointMismatchError(
                f"{path} is of a run of {epochs} epochs, which cannot become a shorter one: give "
                f"--epochs {epochs} or more (found {asked.epochs})"
            )
        waited = payload["epochs_without_improvement"]
        if waited >= asked.patience and (epochs, patience) != (asked.epochs, asked.patience):
            raise CheckpointMismatchError(
                f"{path} has not improved for {waited} epochs, and with --epochs {asked.epochs} "
                f"and --patience {asked.patience} would stop at once: give it more --patience"
            )

    def _check_shapes(self, weights: Mapping[str, Any], path: Path) -> None:
        if difference := _difference(_shapes(weights), self._shapes_as_built):
            raise CheckpointMismatchError(
                f"{path} is of another model than the config asks for ({difference}): give the "
                "run another --name, or restore the arguments and the code (flowjobs' too) that it "
                "was started with"
            )

    def check_initial_weights(self) -> None:
        """Raise a ConfigError for trained weights that are not finite before the first step."""
        weights = dict(self.model.named_parameters())
        if name := first_not_finite({name: weights[name] for name in self._trainable}):
            raise ConfigError(
                f"--arch {type(self.model).__name__}: the parameter {name} is not finite before "
                "the first step: let the constructor initialize it (torch.empty leaves in it what "
                "was in memory)"
            )

    def check_before_save(self, payload: Payload) -> None:
        """Raise if a run could not resume from a payload of this state.

        Raises:
            TrainingDivergedError: It is not finite.
            CheckpointUnloadableError: The model's state has other tensors than when it was built,
                or of other types, to which a restart would round their values.
        """
        if name := self._not_finite(payload):
            rates = f"--lr ({self._config.lr}) or --grad-clip ({self._config.grad_clip})"
            raise TrainingDivergedError(
                f"{name} is not finite after the first step: look for what is not in forward or "
                f"its gradient, as of a division by 0, or lower {rates}"
                if payload["step"] == 1
                else f"{name} is not finite at step {payload['step']}, and the checkpoint before "
                f"is kept: lower {rates}"
            )
        weights = payload["model_state_dict"]
        difference = _difference(_shapes(weights), self._shapes_as_built)
        if not self._types_may_differ:
            difference = difference or _difference(_types(weights), self._types_as_built)
        if difference:
            raise CheckpointUnloadableError(
                f"a run of this model could not be resumed: its state at step {payload['step']} "
                f"is not that of the model as it was built ({difference}): let the constructor "
                "register all parameters and buffers, in their final shapes and types (for a "
                "float torch.tensor(1.0), not torch.tensor(1))"
            )

    def prove(self, payload: Payload, path: Path) -> None:
        """Raise unless a restart could resume from a payload that was just read back from disk.

        Raises:
            CheckpointUnloadableError: The model does not take its own state.
        """
        # The average is a copy of the model as it was built: what a restart loads into.
        built = self.ema.model
        try:
            built.load_state_dict(payload["model_state_dict"])
            self.ema.load_shadow(payload["ema_shadow"], payload["ema_updates"])
        except Exception as error:
            raise _not_taken_back(error) from error

    def start_from_weights(self, payload: Payload, path: Path) -> None:
        """Take over the averaged weights of another run, and nothing else.

        Raises:
            CheckpointMismatchError: It is of another model.
        """
        weights = payload["ema_shadow"]
        nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, COMPILED)
        here = {key.removeprefix(COMPILED): shape for key, shape in self._shapes_as_built.items()}
        if difference := _difference(_shapes(weights), here):
            raise CheckpointMismatchError(
                f"--init-from: {path} is of another model than the config asks for ({difference}): "
                "it takes the weights of the same model, so give the --arch and the arguments that "
                "they were trained with, or another file"
            )
        for model in (self.model, self.ema.model):
            uncompiled(model).load_state_dict(weights)
        self.ema.updates = 0

    def restore(self, payload: Payload, path: Path) -> None:
        """Take over a checkpoint's state; `path` is for the error's text.

        Raises:
            CheckpointNotFiniteError, CheckpointMismatchError: See `check`.
        """
        self.check(payload, path)
        self._note_types(payload, path)
        self._rates = (0, torch.empty(0, 2))
        restore_payload(payload, path, self.model, self.ema, self.optimizer, self.scheduler)
        # The schedule may have become longer since; the optimizer's rate is still the old one's.
        before = self.optimizer.param_groups[0]["lr"]
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.scheduler.last_epoch)
        self.step = payload["step"]
        self.best_loss = payload["best_loss"]
        self.epochs_without_improvement = payload["epochs_without_improvement"]
        self.unvalidated = payload.get("unvalidated")
        self.resumed_from = payload["resumed_from"]
        self.computed_with = payload.get("computed_with", {})
        self.extensions = [*payload.get("extensions", [])]
        if extension := extension_of(payload["config"], self._config, self.step):
            self.extensions.append(extension)
            after = self.optimizer.param_groups[0]["lr"]
            jump = f", the learning rate goes from {before:.3g} to {after:.3g}"
            logger.info(
                "The run is longer from here on: %s%s", extension, jump if after != before else ""
            )

    def _note_types(self, payload: Payload, path: Path) -> None:
        """Warn of a checkpoint from before `check_before_save` looked at types, and let it be."""
        types = _types(payload["model_state_dict"])
        self._types_may_differ = "types_may_differ" in payload
        if difference := _difference(types, self._types_as_built):
            self._types_may_differ = True
            logger.warning(
                "%s has other types than the model as it was built (%s): their values are "
                "rounded at each restart. A run that is made anew says how to mend it",
                path,
                difference,
            )

    def _not_finite(self, payload: Payload) -> str | None:
        """The name of a part of a payload that is NaN or infinite, if there is one.

        Only what is trained and its average and moments: a buffer may be infinite by design.
        """
        moments = payload["optimizer_state_dict"]["state"]
        parts: dict[str, Any] = {
            **{name: payload["model_state_dict"].get(name) for name in self._trainable},
            **{f"{name} (EMA)": payload["ema_shadow"].get(name) for name in self._trainable},
            **{
                f"{key} of AdamW ({number})": tensor
                for number, of in moments.items()
                for key, tensor in of.items()
            },
        }
        return first_not_finite(parts)


def first_not_finite(parts: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinite value, if one does."""
    tensors = {
        name: tensor
        for name, tensor in parts.items()
        if isinstance(tensor, Tensor)
        and tensor.numel()
        and (tensor.is_floating_point() or tensor.is_complex())
    }
    if not tensors:
        return None
    # A tenth of the time of isfinite; a norm may also be infinite because it overflows.
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors.values()])
    finite = torch.stack([norm.real.to("cpu", torch.float64) for norm in norms]).isfinite()
    for (name, tensor), is_finite in zip(tensors.items(), finite.tolist(), strict=True):
        if not is_finite and not bool(tensor.isfinite().all()):
            return name
    return None


def _not_taken_back(error: Exception) -> CheckpointUnloadableError:
    return CheckpointUnloadableError(
        "a run of this model could not be resumed: it does not take back the state that it gave: "
        f"{type(error).__name__}: {error}"
    )


def _shapes(weights: Mapping[str, Any]) -> dict[str, str]:
    return _of_each(weights, lambda tensor: str(tuple(tensor.shape)))


def _types(weights: Mapping[str, Any]) -> dict[str, str]:
    def told(tensor: Tensor) -> str:
        if tensor.layout is not torch.strided:
            return f"{tensor.dtype} {tensor.layout}"
        # Integers of any type are exact: a count may become wider as another is added.
        return "an integer type" if tensor.dtype in INTEGERS else str(tensor.dtype)

    return _of_each(weights, told)


def _of_each(weights: Mapping[str, Any], told: Callable[[Tensor], str]) -> dict[str, str]:
    # What get_extra_state gives may be anything, and of another shape each time.
    return {
        key: told(value) if isinstance(value, Tensor) else "present"
        for key, value in weights.items()
        if not key.endswith(nn.modules.module._EXTRA_STATE_KEY_SUFFIX)
    }


def _difference(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    for key in sorted(there.keys() | here.keys()):
        shapes = [part.get(key, "absent") for part in (there, here)]
        if shapes[0] != shapes[1]:
            return f"{key}: {shapes[0]} there, {shapes[1]} here"
    return ""
