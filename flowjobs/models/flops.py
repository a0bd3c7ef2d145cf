"""What a model costs: parameters, and floating-point operations of a sample."""

import copy
import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowjobs.data.randomness import random_numbers_kept
from flowjobs.models.velocity import input_dtype


def parameters_in(model: nn.Module) -> int:
    """All parameters of a model, trained or not."""
    return sum(weights.numel() for weights in model.parameters())


def flops_per_sample(model: nn.Module, shape: Iterable[int]) -> int | None:
    """Operations of the forward pass of one row; a multiplication and an addition are two.

    Those of matrix products, convolutions and attention, as torch counts them.

    Args:
        model: The model; a copy of it is called, in evaluation mode.
        shape: Of a row.

    Returns:
        None where a single row cannot be counted.
    """
    devices = {weights.device for weights in model.parameters()}
    # On "meta" there are shapes and no numbers: it costs nothing, and attention is counted, which
    # the CPU's own kernel is not. A model that keeps tensors beside its parameters fails there.
    for device in (torch.device("meta"), *devices):
        counter = FlopCounterMode(display=False)
        try:
            with random_numbers_kept(), warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                counted = copy.deepcopy(model).to(device).eval()
                dtype = input_dtype(counted)
                x = torch.zeros(1, *shape, dtype=dtype, device=device)
                with counter:
                    counted(x, torch.zeros(1, dtype=dtype, device=device))
        except Exception:
            continue
        return int(counter.get_total_flops())
    return None
