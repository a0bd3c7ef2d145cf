"""What a model costs: parameters, and floating-point operations of a sample."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flowjobs.data.randomness import random_numbers_kept
from flowjobs.models.velocity import input_dtype


def parameters_in(model: nn.Module) -> int:
    """All parameters of a model, trained or not."""
    return sum(weights.numel() for weights in model.parameters())


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts by torch's formulas, as its FlopCounterMode does.

    That one is shielded from torch.compile, for which it imports dynamo: a second of CPU at each
    start of a run. Nothing is compiled here.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_per_sample(model: nn.Module, shape: Iterable[int]) -> int | None:
    """Operations of the forward pass of one row; a multiplication and an addition are two.

    Those of matrix products, convolutions and attention, as torch counts them.

    Args:
        model: The model; a copy of it is called, in evaluation mode.
        shape: Shape of a row.

    Returns:
        None where a single row cannot be counted.
    """
    device = next((weights.device for weights in model.parameters()), torch.device("cpu"))
    counter = _Counter()
    try:
        # Attention as matrix products: the CPU's own kernel for it has no formula.
        with random_numbers_kept(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            counted = copy.deepcopy(model)
            counted.eval()  # a `train` of the model's own may return nothing
            dtype = input_dtype(counted)
            x = torch.zeros(1, *shape, dtype=dtype, device=device)
            with counter, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counted(x, torch.zeros(1, dtype=dtype, device=device))
    except Exception:
        return None  # it may want more than one row; what is wrong is said when it trains
    return counter.flops


def flops_of_batch(model: nn.Module, rows: int, a_row: int | None) -> int:
    """Operations of the forward pass of a batch.

    Args:
        model: Where a row cannot be counted, each of its parameters is used once.
        rows: Rows of the batch.
        a_row: `flops_per_sample`.
    """
    return rows * (a_row or 2 * parameters_in(model))
