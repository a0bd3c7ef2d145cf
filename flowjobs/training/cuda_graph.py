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

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from flowjobs.slots import runs_that_share
from flowjobs.training.watched import watched

logger = logging.getLogger(__name__)

# Takes tensors of the same shapes at each call; returns tensors on the GPU.
Function = Callable[..., tuple[Tensor, ...]]

# The first calls make an optimizer's moments, choose algorithms, compile.
PLAIN_CALLS = 3
# How far a replay may be from a plain call, as a share of what that changes in a tensor, and of its
# size, where operations add in any order.
TOLERANCE = 1e-2
ROUNDING = 1e-6
NOISE = 4
# A longer call gains little from a cheap launch, and a replay cannot be interrupted.
LONGEST_CALL_S = 1.0
# Share of the GPU's free memory that a graph may take.
MEMORY_SHARE = 0.5


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
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        began, ended = _moment(), _moment()
        with watched(*self._calls) as reasons:
            began.record()
            results = self._function(*inputs)
            ended.record()
        ended.synchronize()
        seconds = began.elapsed_time(ended) / 1e3
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
        values = [*changed, *returned]
        good = all(self._is_as_good(*of) for of in values)
        if not good and not self._exact:
            found = tuple(of.clone() for of in found)
            replayed = self._copies()
            self._restore(before)
            generator.set_state(drawn)
            again = [*self._function(*inputs)]
            others = [*self._copies(), *again]
            self._restore(replayed)
            good = all(
                self._is_as_good(was, plain, gave) or _is_near(plain, gave, other)
                for (was, plain, _), gave, other in zip(
                    values, [*replayed, *found], others, strict=True
                )
            )
        if good:
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
        way, size = _apart(expected, before), _size_of(expected)
        most = torch.maximum(TOLERANCE * way, ROUNDING * size)
        return bool(_apart(found, expected) <= most)  # not where it is NaN


def _is_near(plain: Tensor, found: Tensor, other: Tensor) -> bool:
    """Whether what is found is no further from a plain call than another plain call is.

    A gradient that is 0 but for rounding (of a bias before a BatchNorm) is another noise at each,
    where operations add in any order, and AdamW makes it as large as any.
    """
    if not plain.is_floating_point():
        return False
    return bool(_apart(found, plain) <= NOISE * _apart(other, plain))


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return _size_of(one - other)


def _moment() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _size_of(of: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(of.double())
    return size


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
