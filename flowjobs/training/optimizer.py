"""AdamW, used without loading the machinery of torch.compile, and an optimizer's state by name."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer


class LightAdamW(AdamW):
    """AdamW as torch has it.

    Torch keeps these four methods out of compiled code by wrappers that import torch._dynamo when
    one is first called: with plain AdamW that takes 0.95 to 1.03 s at every start of a run, and no
    code of ours calls them from compiled code.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(AdamW.step))


def step_at(optimizer: Optimizer, rate: Tensor) -> None:
    """One step at a learning rate that is read on the GPU, so that a CUDA graph reads it anew.

    Args:
        optimizer: With one group of weights, which keeps the number that it has.
        rate: float32 of shape (), on the GPU.

    Raises:
        RuntimeError: A graph is captured, and a parameter was without a gradient so far.
    """
    (group,) = optimizer.param_groups
    number = group["lr"]
    captures = torch.cuda.is_current_stream_capturing()
    if captures and any(
        of.grad is not None and of not in optimizer.state for of in group["params"]
    ):
        # Its moments would be made in the graph, and anew at each replay.
        raise RuntimeError("a parameter has its first gradient only now")
    group["lr"], group["capturable"] = rate, captures
    try:
        optimizer.step()
    finally:
        group["lr"], group["capturable"] = number, False


def names_of_weights(optimizer: Optimizer, model: nn.Module) -> list[str] | None:
    """The names of an optimizer's weights, in the order in which its state numbers them.

    Returns:
        None if it has others beside those of `model`.
    """
    names = {id(weights): name for name, weights in model.named_parameters()}
    ids = _ids(optimizer)
    return [names[of] for of in ids] if names.keys() >= set(ids) else None


def load_by_name(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    names: Sequence[str] | None,
    model: nn.Module,
    saved_model: Iterable[str],
) -> None:
    """Put a saved state into an optimizer, each moment to the weights that it is of.

    Torch goes by number alone, and AdamW's fused kernel by memory: it would take the moments of
    other weights, also of another size. A model has another order where its code was edited, or
    makes its layers from a set of names. The optimizer gets the order that was saved, since the
    last bits of a sum over all weights (the gradient's norm) depend on it.

    Args:
        optimizer: One of weights of `model`.
        state: Its `state_dict` as it was saved.
        names: What `names_of_weights` was then; None in files of an older version.
        model: The model, with the saved weights.
        saved_model: The names in the model's saved `state_dict`, in its order.

    Raises:
        ValueError: It is the state of other weights.
    """
    if names is not None:
        _reorder(optimizer, model, names)
    elif _order(model.state_dict(), model, optimizer) == _ids(optimizer):
        # Then, too, the optimizer's order was that of the model's state.
        _reorder(optimizer, model, saved_model)
    for number, weights in enumerate(_weights(optimizer)):
        for key, moment in state["state"].get(number, {}).items():
            # Other optimizers may keep a moment of each row.
            is_per_value = isinstance(optimizer, Adam | AdamW) and key != "step"
            if is_per_value and moment.shape != weights.shape:
                there, here = tuple(moment.shape), tuple(weights.shape)
                raise ValueError(f"{key} of weights {number}: {there} there, {here} here")
    optimizer.load_state_dict(dict(state))
    for weights, moments in optimizer.state.items():
        for key, moment in moments.items():
            of_values = isinstance(moment, Tensor) and moment.shape == weights.shape
            if of_values and moment.stride() != weights.stride():  # channels_last, say
                moments[key] = torch.empty_like(weights, dtype=moment.dtype).copy_(moment)


def _reorder(optimizer: Optimizer, model: nn.Module, names: Iterable[str]) -> None:
    order = _order(names, model, optimizer)
    places = {of: place for place, of in enumerate(order)}
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda weights: places.get(id(weights), len(places)))
    if _ids(optimizer) != order:
        raise ValueError("the optimizer was of other weights, or has them in other groups")


def _order(names: Iterable[str], model: nn.Module, optimizer: Optimizer) -> list[int]:
    """The ids of an optimizer's weights in the order of `names`; tied ones have several."""
    named = {name: id(of) for name, of in model.named_parameters(remove_duplicate=False)}
    ids = set(_ids(optimizer))
    return [*dict.fromkeys(named[name] for name in names if named.get(name) in ids)]


def _ids(optimizer: Optimizer) -> list[int]:
    return [id(weights) for weights in _weights(optimizer)]


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [weights for group in optimizer.param_groups for weights in group["params"]]
