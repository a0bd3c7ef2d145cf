"""What is computed at each step as one CUDA graph, which is launched at once.

A small network's step waits for the launch of some 300 kernels, and not for what they compute. What
a replay reads anew is written to its place before: a step's pair, its learning rate, its share in
the average. Times, noise and dropout are drawn within it from the default generator, whose seed and
offset torch writes for each replay. So it gives what a plain step gives, and a run may be
interrupted anywhere.

A graph calls no Python. Whether a model can do without is found out by watching a plain call, and
by comparing the first replay with the call that it stands for. What is not seen: what forward
changes outside of the model, its class and its flow, but does not use in the next steps.
"""

import itertools
import logging
import random
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowjobs.slots import runs_that_share

logger = logging.getLogger(__name__)

# Of tensors of the same shapes at each call; gives tensors on the GPU.
Function = Callable[..., tuple[Tensor, ...]]

# The first calls make an optimizer's moments, choose algorithms, compile.
PLAIN_CALLS = 3
# How far a replay may be from a plain call, as a share of what that changes in a tensor, and of its
# size, where operations add in any order.
TOLERANCE = 1e-2
ROUNDING = 1e-6
# Of a call that takes longer, the launch takes little; and a replay cannot be left in between.
LONGEST_CALL_S = 1.0
# Of the GPU's free memory.
MEMORY_SHARE = 0.5
# Of what a module holds in Python, more is not looked through.
LARGEST_ARRAY = 1_000_000
LONGEST_LIST = 10_000
SYNCHRONIZES = "called a synchronizing CUDA operation"


class Graphed:
    """Calls a function plainly at first, and then as replays of a graph where these do the same.

    Args:
        what: The function's name in the log.
        function: Computes on the GPU.
        calls: What it calls: a model first.
        changes: Gives all tensors that it changes.
        exact: Whether a replay must give the bits of a plain call.

    Attributes:
        captured: Whether calls are replays now.
        refused: Whether they never will be.
    """

    def __init__(
        self,
        what: str,
        function: Function,
        calls: tuple[nn.Module, *tuple[object, ...]],
        changes: Callable[[], Sequence[Tensor]],
        *,
        exact: bool,
    ) -> None:
        self._what = what
        self._function = function
        self._calls = calls
        self._changes = changes
        self._exact = exact
        self._plain_calls = 0
        self.refused = False
        self._replay: _Replay | None = None

    @property
    def captured(self) -> bool:
        """See the class."""
        return self._replay is not None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function gives; the next call may write over it."""
        if self._replay:
            return self._replay(*inputs)
        self._plain_calls += 1
        if self.refused or self._plain_calls <= PLAIN_CALLS:
            return self._function(*inputs)
        if self._plain_calls == PLAIN_CALLS + 1:
            return self._watch(*inputs)
        return self._try(*inputs)

    def _watch(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A plain call, after which it is known whether there can be a graph."""
        self._drop_gradients()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, began = torch.cuda.memory_allocated(), time.monotonic()
        with _watched(*self._calls) as reasons:
            results = self._function(*inputs)
        torch.cuda.synchronize()
        seconds = time.monotonic() - began
        needed = torch.cuda.max_memory_allocated() - held
        if seconds > LONGEST_CALL_S:
            reasons.append(f"a call takes {seconds:.1f} s, and its launch little of it")
        if reasons or (reasons := [*self._too_large(needed)]):
            self._refuse(reasons[0])
        return results

    def _drop_gradients(self) -> None:
        for weights in self._calls[0].parameters():
            weights.grad = None

    def _too_large(self, needed: int) -> Iterator[str]:
        """Why a graph would take too much memory, which it keeps, if a call needs so much."""
        changes = self._changes()
        if any(of.layout is not torch.strided for of in changes):
            yield "the model has a sparse buffer"
            return
        needed += 2 * sum(of.nbytes for of in changes)
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = (torch.cuda.mem_get_info()[0] + cached) // runs_that_share()
        if needed > MEMORY_SHARE * free:
            yield f"that takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} of the GPU are free"

    def _refuse(self, reason: str) -> None:
        self.refused = True
        logger.info("%s not captured in a CUDA graph: %s", self._what, reason)

    def _try(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Make a graph, and keep it if its first replay does what the function does."""
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        drawn, stream = generator.get_state(), torch.cuda.current_stream()
        replay, before = None, []
        try:
            before = self._copies()
            replay = _Replay(self._function, *inputs)
        except RuntimeError as error:
            # It is left as if the capture went on: it would refuse to draw.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(torch.Generator(generator.device))
            generator.set_state(drawn)
            self._refuse(str(error).strip().partition("\n")[0])
        if replay is None:
            before.clear()  # it may be memory that was lacking
            return self._function(*inputs)
        expected = self._function(*inputs)
        after = self._copies()
        if len(before) != len(after):
            self._refuse("a parameter has its first gradient only now")
            return expected
        self._restore(before)
        generator.set_state(drawn)
        found = replay(*inputs)
        changed = zip(before, after, self._changes(), strict=True)
        returned = zip(map(torch.zeros_like, expected), expected, found, strict=True)
        if all(self._is_as_good(*values) for values in (*changed, *returned)):
            self._replay = replay
            self._drop_gradients()
            return found
        self._restore(after)
        self._refuse("a replay does not give what a plain call gives")
        return expected

    def _copies(self) -> list[Tensor]:
        return [of.detach().clone() for of in self._changes()]

    def _restore(self, copies: Sequence[Tensor]) -> None:
        for of, copy in zip(self._changes(), copies, strict=True):
            of.detach().copy_(copy)

    def _is_as_good(self, before: Tensor, expected: Tensor, found: Tensor) -> bool:
        """Whether what is found is what is expected, by what was before."""
        if torch.equal(expected, found):
            return True
        if self._exact or not found.is_floating_point():
            return False
        apart, way = (found - expected).double().norm(), (expected - before).double().norm()
        most = torch.maximum(TOLERANCE * way, ROUNDING * expected.double().norm())
        return bool(apart <= most)  # not where it is NaN


class _Replay:
    """A captured call of a function."""

    def __init__(self, function: Function, *inputs: Tensor) -> None:
        self._inputs = [of.clone() for of in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: they write checkpoints, read rows and solve plans.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if inputs:
            torch._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        return self._results


@contextmanager
def _watched(model: nn.Module, *others: object) -> Iterator[list[str]]:
    """Look at what a plain call does beside its kernels, which a replay would not.

    Args:
        model: What is called.
        others: What is called beside it.

    Yields:
        A list that has the reasons why it cannot be replayed, once the block has ended.
    """
    found = [f"{name} has hooks, which a replay does not call" for name in _hooked(model)]
    kept, states = _kept_by(model, others), _generators()
    with _synchronizing() as calls:
        yield found
    if calls:
        found.append("forward waits for the GPU, as .item() or a branch on a tensor's value does")
    if _generators() != states:
        found.append("forward draws from random, numpy or torch's generator of the CPU")
    now = _kept_by(model, others)
    for place in kept.keys() | now.keys():
        if kept.get(place) != now.get(place):
            found.append(f"forward changes {place}, which a replay does not")
            break


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
    kept: dict[str, object] = {f"the {type(of).__name__}": _mark(of) for of in others}
    for name, module in model.named_modules():
        place = f"{name}." if name else ""
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                kept |= {f"{place}{own}": _Which(of) for own, of in value.items()}
            else:
                kept[place + key] = _mark(value)
        for kind in type(module).__mro__:
            if not kind.__module__.startswith(("torch.", "builtins")):
                for key, value in vars(kind).items():
                    if isinstance(value, int | float | str | list | dict):
                        kept[f"{kind.__name__}.{key}"] = _mark(value)
    return kept


def _mark(value: Any, depth: int = 4) -> object:
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return value
        case Tensor() if value.device.type == "cpu":
            return _Which(value, value._version)  # what is done to it is in no graph
        case Tensor() | nn.Module() | type():
            return _Which(value)
        case random.Random() if not isinstance(value, random.SystemRandom):
            return value.getstate()
        case np.ndarray() if value.nbytes <= LARGEST_ARRAY:
            return value.tobytes()
        case np.random.Generator():
            return repr(value.bit_generator.state)
        case torch.Generator() if value.device.type == "cpu":
            return value.get_state().numpy().tobytes()
        case itertools.count():
            return repr(value)
        case _ if not depth or (isinstance(value, Sized) and len(value) > LONGEST_LIST):
            return _Which(value)
        case Mapping():
            return [(_mark(key, 0), _mark(item, depth - 1)) for key, item in value.items()]
        case list() | tuple() | set() | frozenset() | deque():
            return [_mark(item, depth - 1) for item in value]
    parts = [*vars(value).values()] if hasattr(value, "__dict__") else []
    cells = getattr(value, "__closure__", None) or ()  # of a function
    parts += [cell.cell_contents for cell in cells if cell != type(cell)()]
    return _Which(value), [_mark(part, depth - 1) for part in parts]
