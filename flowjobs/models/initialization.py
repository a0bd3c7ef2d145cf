"""Weights that a model's forward writes itself, as where it initializes them from its first batch.

A restart, the moving average and the model that is sampled are built anew, and know of that what
the state says: tensors, and what `get_extra_state` gives, but no attribute.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowjobs.data.randomness import random_numbers_kept
from flowjobs.errors import ConfigError
from flowjobs.models.velocity import input_dtype

# By name: each weight, and its values.
Values = dict[str, tuple[nn.Parameter, Tensor]]

WHAT_TO_DO = (
    "what says that weights are initialized from the first batch must be in the state: a buffer "
    "(register_buffer), not an attribute"
)


def values_of(model: nn.Module) -> Values:
    """The weights of a model as they are now."""
    return {name: (of, of.detach().clone()) for name, of in model.named_parameters()}


def changed(model: nn.Module, before: Values) -> str | None:
    """The name of a weight that is another one, or has other values, than before."""
    now = dict(model.named_parameters())
    for name, (weights, values) in before.items():
        # NaN is no change: what has diverged is said elsewhere.
        same = torch.isclose(weights, values, rtol=0, atol=0, equal_nan=True).all()
        if now.get(name) is not weights or not bool(same):
            return name
    return None


@contextmanager
def kept_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Raise a ConfigError if a weight is another one when the block has called the model.

    Args:
        model: The moving average, in evaluation mode: what forward writes would replace it.
    """
    before = values_of(model)
    yield
    if name := changed(model, before):
        raise ConfigError(
            f"--arch {type(model).__name__}: forward changes {name} in evaluation mode, in which "
            "it is the moving average, that validation and samples are of: change it where "
            f"self.training alone; {WHAT_TO_DO}"
        )


def check_restart(
    model: nn.Module, built: nn.Module, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise a ConfigError where a restart would initialize weights from a batch again.

    Copies are called, in the model's modes.

    Args:
        model: The model, whose forward has written weights in its first step.
        built: What a restart would have: a model of the same class that was never trained, with
            the tensors of a state.
        shape: Of a batch.
        device: Where both are.
    """

    def writes(of: nn.Module) -> str | None:
        trial = copy.deepcopy(of)
        trial.train()  # one of the model's own may return nothing
        for part, trained in zip(trial.modules(), model.modules(), strict=True):
            part.training = trained.training
        before, dtype = values_of(trial), input_dtype(trial)
        x = torch.randn(shape, device=device, dtype=dtype)
        trial(x, torch.rand(len(x), device=device, dtype=dtype))
        return changed(trial, before)

    try:
        with random_numbers_kept(device), torch.no_grad():
            again, always = writes(built), writes(model)
    except Exception:
        return  # it cannot be copied, or not be called so: nothing is known
    if again and not always:  # as one does that normalizes its weights in each step
        raise ConfigError(
            f"--arch {type(model).__name__}: forward initializes {again} from the first batch, and "
            f"would again at each restart: {WHAT_TO_DO}"
        )
