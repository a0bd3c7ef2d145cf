"""What a call of a model does beside its kernels, which a replay of a CUDA graph would not do.

A graph calls no Python. So the model is looked at before a call and after it: what its modules,
their classes and the flow hold, who draws random numbers, and who waits for the GPU.
"""

import itertools
import logging
import random
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SYNCHRONIZES = "called a synchronizing CUDA operation"
# More is not looked through.
LARGEST_ARRAY = 1_000_000
LONGEST_LIST = 10_000
MOST_OBJECTS = 100_000


@contextmanager
def watched(model: nn.Module, *others: object) -> Iterator[list[str]]:
    """Look at what a plain call does beside its kernels, which a replay would not.

    Args:
        model: What is called.
        others: What is called beside it.

    Yields:
        A list that has the reasons why it cannot be replayed, once the block has ended.
    """
    found = [f"{name} has hooks, which a replay does not call" for name in _hooked(model)]
    kept, states = _look_through(model, others, found), _generators()
    with _synchronizing() as calls:
        yield found
    if calls:
        found.append("forward waits for the GPU, as .item() or a branch on a tensor's value does")
    if _generators() != states:
        found.append("forward draws from random, numpy or torch's generator of the CPU")
    now = _look_through(model, others, found)
    for place in kept.keys() | now.keys():
        if [kept.get(place)] != [now.get(place)]:  # in lists NaN is equal to itself
            found.append(f"forward changes {place}, which a replay does not")
            break


def _look_through(
    model: nn.Module, others: Sequence[object], found: list[str]
) -> dict[str, object]:
    try:
        return _kept_by(model, others)
    except Exception as error:  # of whatever objects the user's model holds
        found.append(f"the model cannot be looked through: {type(error).__name__}: {error}")
        return {}


@contextmanager
def _synchronizing() -> Iterator[list[str]]:
    """Notes where this thread waits for the GPU within the block."""
    here, before = threading.get_ident(), torch.cuda.get_sync_debug_mode()
    found: list[str] = []
    # Another thread that waits for it now is warned when that is over.
    warnings.filterwarnings("ignore", message=SYNCHRONIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setting it warns of it
        torch.cuda.set_sync_debug_mode("warn")
        warnings.filterwarnings("always", message=SYNCHRONIZES)

        def note(message: Warning | str, *args: object, **kwargs: object) -> None:
            if threading.get_ident() == here:
                found.append(str(message))

        warnings.showwarning = note
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _generators() -> tuple[object, ...]:
    numpy_state = np.random.get_state(legacy=False)["state"]
    drawn = (numpy_state["key"].tobytes(), numpy_state["pos"])
    return random.getstate(), drawn, torch.get_rng_state().numpy().tobytes()


def _hooked(model: nn.Module) -> Iterator[str]:
    """The names of what calls hooks as a step is taken."""
    for name, module in model.named_modules():
        before, after = module._forward_pre_hooks, module._forward_hooks
        if before or after or module._backward_pre_hooks or module._backward_hooks:
            yield name or type(module).__name__
    for name, weights in model.named_parameters():
        if weights._backward_hooks or getattr(weights, "_post_accumulate_grad_hooks", None):
            yield name
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        yield "every module"


class _Which:
    """What cannot be compared by what it holds: which object it is."""

    def __init__(self, value: object, version: int = 0) -> None:
        self._value = value
        self._version = version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Which):
            return False
        return self._value is other._value and self._version == other._version

    __hash__ = None  # type: ignore[assignment]


def _kept_by(model: nn.Module, others: Sequence[object]) -> dict[str, object]:
    """What the modules of a model hold, and others, by its place."""
    look = _Look()
    kept = {f"the {type(of).__name__}": look.at(of) for of in others}
    for name, module in model.named_modules():
        place = f"{name}." if name else ""
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                kept |= {f"{place}{own}": _Which(of) for own, of in value.items()}
            else:
                kept[place + key] = look.at(value)
        for kind in type(module).__mro__:
            if not kind.__module__.startswith(("torch.", "builtins")):
                for key, value in vars(kind).items():
                    if isinstance(value, int | float | str | list | dict):
                        kept[f"{kind.__name__}.{key}"] = look.at(value)
    return kept


class _Look:
    """Looks through Python objects, each once; what asks them of themselves may run any code."""

    def __init__(self) -> None:
        # Held, so that no other object gets their id.
        self._seen: dict[int, object] = {}

    def at(self, value: Any, depth: int = 4) -> object:
        """What can be compared of a value: what it holds, or which object it is."""
        match value:
            case None | bool() | int() | float() | complex() | str() | bytes():
                return value
            case Tensor() if value.device.type == "cpu" and not value.is_inference():
                return _Which(value, value._version)  # what is done to it is in no graph
            case Tensor() | nn.Module() | type() | ModuleType() | logging.Logger():
                return _Which(value)
            case random.Random() if not isinstance(value, random.SystemRandom):
                return value.getstate()
            case np.random.Generator():
                return repr(value.bit_generator.state)
            case np.ndarray() if value.nbytes <= LARGEST_ARRAY:
                return value.tobytes()
            case torch.Generator() if value.device.type == "cpu":
                return value.get_state().numpy().tobytes()
            case itertools.count():
                return repr(value)
        if not depth or id(value) in self._seen or len(self._seen) > MOST_OBJECTS:
            return _Which(value)
        self._seen[id(value)] = value
        return _Which(value), [self.at(part, depth - 1) for part in _parts_of(value)]


def _parts_of(value: Any) -> list[object]:
    match value:
        case dict() if len(value) <= LONGEST_LIST:
            return [*value.keys(), *value.values()]
        case list() | tuple() | set() | frozenset() | deque() if len(value) <= LONGEST_LIST:
            return [*value]
        case MethodType():
            return [value.__self__, value.__func__]
        case FunctionType():
            cells = value.__closure__ or ()
            return [cell.cell_contents for cell in cells if cell != CellType()]
    return [*vars(value).values()] if hasattr(value, "__dict__") else []
