"""How a model is called: in the type of its weights, and checked for what it returns."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError

Velocity = Callable[[Tensor, Tensor], Tensor]

# Outside of training a model is called on no more numbers, or no more rows than in a step: the GPU
# was chosen for those. Small rows come in larger parts, since each call has its price.
NUMBERS_AT_ONCE = 2**18


def input_dtype(model: nn.Module) -> torch.dtype:
    """What a model is given x and t in: float64 where all its weights are, else float32.

    A table of integers or complex numbers, which `model.double()` leaves as it is, is none of them.
    """
    dtypes = {of.dtype for of in model.parameters() if of.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def checked_velocity(model: Velocity, dtype: torch.dtype, name: str) -> Velocity:
    """A model that takes float32, returns float32, and raises where it returns no velocity.

    Args:
        model: The model, or what stands for it (compiled, joined to other ranks).
        dtype: What it is given x and t in.
        name: Its name in the error's text.

    Returns:
        The velocity at x of shape (batch, dim) and t of shape (batch,). It raises a ConfigError
        for another shape, which the loss would broadcast and nobody notice until all is trained.
        That is found at the first step and not before: a trial call would change a model that
        initializes itself from the first batch, and counters in its buffers.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        found: object = model(x.to(dtype), t.to(dtype))
        if not isinstance(found, Tensor):
            raise ConfigError(_unexpected(name, x, t, f"a {type(found).__name__}"))
        if found.shape != x.shape:
            raise ConfigError(_unexpected(name, x, t, str(tuple(found.shape))))
        if not found.is_floating_point():
            kind = str(found.dtype).removeprefix("torch.")
            raise ConfigError(_unexpected(name, x, t, f"numbers of type {kind}"))
        return found.float()

    return velocity


def rows_at_once(config: TrainingConfig, ranks: int, numbers: int) -> int:
    """How many rows a model is called on outside of training, at most.

    Args:
        config: Gives the size of a batch.
        ranks: Processes that share it.
        numbers: How many a row has.
    """
    return max(config.batch_size // ranks, NUMBERS_AT_ONCE // numbers, 1)


def frozen_in_evaluation(model: nn.Module) -> list[nn.Module]:
    """The parts that a constructor has put into evaluation mode for good; none of a whole model.

    Those with weights to train are not meant: libraries give what is pretrained in that mode.
    """
    parts = [part for part in (model.modules() if model.training else ()) if not part.training]
    trained = {
        inner
        for part in parts
        if any(weights.requires_grad for weights in part.parameters())
        for inner in part.modules()
    }
    return [part for part in parts if part not in trained]


def _unexpected(name: str, x: Tensor, t: Tensor, found: str) -> str:
    return (
        f"--arch {name}: for x of shape {tuple(x.shape)} and t of shape {tuple(t.shape)} forward "
        f"returns {found}, expected a velocity of shape {tuple(x.shape)}"
    )
