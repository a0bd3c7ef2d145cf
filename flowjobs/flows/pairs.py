"""The pairs of source and data that a step trains on, normalized and on the device."""

import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data.augmentation import augmented
from flowjobs.data.batches import Batches
from flowjobs.data.randomness import derive_seed, generator_for, seeded
from flowjobs.data.read_ahead import ReadAhead
from flowjobs.data.source import Source
from flowjobs.errors import ConfigError
from flowjobs.flows.flow import BUILT_IN_COUPLINGS, Coupling, Flow

Pair = tuple[Tensor, Tensor]
# A pair, and where another stream computes it, what tells that it has.
_Solved = tuple[Pair, torch.cuda.Event | None]
# What a plan may be of; numbers of another type are a mask, or no index.
INDICES = (torch.int64, torch.int32)


class Pairs(Protocol):
    """Pairs by step."""

    def at(self, step: int) -> Pair:
        """This rank's x_0 and x_1 of a step (0 is the first), each of shape (n, *shape)."""
        ...


class IndependentPairs:
    """Rows of the data, each with a draw from the source by the default generator."""

    def __init__(self, batches: Batches, source: Source, config: TrainingConfig, rank: int) -> None:
        self._batches, self._source = batches, source
        self._config, self._rank = config, rank

    def at(self, step: int) -> Pair:
        """See `Pairs`."""
        x_1 = augmented(self._batches.rows(step), self._config, step, self._rank)
        return self._source.draw(len(x_1), None, x_1.device), x_1


class GivenPairs:
    """Pairs that a model made, as rows of shape (2, *shape)."""

    def __init__(self, batches: Batches, config: TrainingConfig, rank: int) -> None:
        self._batches = batches
        self._config, self._rank = config, rank

    def at(self, step: int) -> Pair:
        """See `Pairs`."""
        x_0, x_1 = self._batches.rows(step).unbind(1)
        return x_0, augmented(x_1, self._config, step, self._rank, paired=True)


class CoupledPairs:
    """The rows of some steps, paired at once with as many draws from the source.

    A thread of its own solves the plans of the coming steps meanwhile: the solvers let go of the
    interpreter. On a GPU it has a stream of its own: a plan is solved on the host, and the copy of
    its costs would wait there for all steps that are queued. A coupling of the user's own is called
    between the steps, since it may draw from the generators that they draw from. The draws and the
    plan follow from the seed and the place of these steps, so that a run that resumes within them
    solves them again.

    Args:
        batches: The data. They are read in the thread, and nowhere else.
        source: What x_0 is drawn from.
        couple: Solves for the plan.
        config: Gives the seed, sigma, and how many rows are paired at once.
        rank: This process among those that share a batch; each pairs its own rows.
    """

    def __init__(
        self,
        batches: Batches,
        source: Source,
        couple: Coupling,
        config: TrainingConfig,
        rank: int,
    ) -> None:
        self._batches, self._source = batches, source
        self._couple, self._config, self._rank = couple, config, rank
        self._steps = max(1, (config.ot_batch or config.batch_size) // config.batch_size)
        self._group = -1
        self._pairs: Pair | None = None
        self._coming: ReadAhead[_Solved] | None = None
        self._stream: torch.cuda.Stream | None = None
        # Where they begin anew, the thread of those before may still read.
        self._reading = threading.Lock()

    def at(self, step: int) -> Pair:
        """See `Pairs`. Steps that follow one another are solved ahead."""
        group, place = divmod(step, self._steps)
        if group != self._group or self._pairs is None:
            if self._coming is None or group != self._group + 1:
                beside = self._couple in BUILT_IN_COUPLINGS
                n_threads = min(1, self._config.num_workers) if beside else 0
                n_rows = self._config.ot_batch or self._config.batch_size
                name = f"the plan of {self._config.flow} for {n_rows} rows (--ot-batch)"
                if n_threads:
                    self._take_stream()
                # To its end: of many rows it may be computed for longer than any file is read.
                solves = self._solves_from(group)
                self._coming = ReadAhead(solves, n_threads, name, wait_s=None)
            # First of all, since the wait may be broken off (Ctrl-C in a notebook): the plan is no
            # more among the coming ones then, and they begin anew.
            self._group, self._pairs = group, None
            self._pairs = _ready(self._coming.next())
        x_0, x_1 = (part.chunk(self._steps)[place] for part in self._pairs)
        return x_0, x_1

    def _take_stream(self) -> None:
        """Give the thread a stream, which begins where this one's is: with the data there."""
        device = self._batches.device
        if device.type == "cuda":
            if self._stream is None:
                # High priority: its little work does not wait behind a step's kernels.
                self._stream = torch.cuda.Stream(device, -1)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def _solves_from(self, group: int) -> Iterator[Callable[[], _Solved]]:
        for coming in itertools.count(group):
            yield partial(self._solve, coming)

    def _solve(self, group: int) -> _Solved:
        if self._stream is None:
            return self._solved(group), None
        with torch.cuda.stream(self._stream):
            return self._solved(group), self._stream.record_event()

    def _solved(self, group: int) -> Pair:
        steps = range(group * self._steps, (group + 1) * self._steps)
        with self._reading:
            rows = [self._batches.rows(step) for step in steps]
        parts = zip(rows, steps, strict=True)
        x_1 = torch.cat([augmented(of, self._config, step, self._rank) for of, step in parts])
        place = (self._config.seed, "pairs", group, self._rank)
        x_0 = self._source.draw(len(x_1), generator_for(x_1.device, *place), x_1.device)
        plan = plan_of(self._couple, (x_0, x_1), self._config.sigma, derive_seed(*place, "plan"))
        return x_0[plan], x_1


def _ready(solved: _Solved) -> Pair:
    """Pairs that may be of another stream, for the steps of this one."""
    pair, computed = solved
    if computed is not None:
        here = torch.cuda.current_stream(pair[0].device)
        here.wait_event(computed)
        for part in pair:
            # Or its memory might be given to the next pair while a step still reads it.
            part.record_stream(here)
    return pair


def plan_of(couple: Coupling, pair: Pair, sigma: float, seed: int) -> Tensor:
    """For each row of x_1 the row of x_0 that it is paired with; follows from the arguments alone.

    Args:
        couple: Solves for it. One of the user's own finds the default generators seeded.
        pair: x_0 and x_1, each of shape (n, *shape).
        sigma: The config's.
        seed: Seed of the plan.

    Raises:
        ConfigError: A coupling of the user's own returns something else.
    """
    x_0, x_1 = (part.flatten(1) for part in pair)
    if couple in BUILT_IN_COUPLINGS:  # in a thread: what others draw from is not to be touched
        return couple(x_0, x_1, sigma, seed)
    with seeded(x_0.device, seed):
        # Given copies, which it may write into: the plan is kept, and pairs the rows as they are.
        plan: object = couple(x_0.clone(), x_1.clone(), sigma, seed)
    # Any other indexes something as well, and pairs rows that nobody meant.
    n, words = len(x_0), _described(plan)
    if isinstance(plan, Tensor) and plan.dtype in INDICES and plan.shape == (n,):
        least, most = (int(end) for end in plan.aminmax())
        if least >= 0 and most < n:
            return plan
        words += f", from {least} to {most}"
    raise ConfigError(
        f"--flow: for {n} rows the coupling returns {words}, expected a tensor of type int64 and "
        f"shape ({n},): for each row of x_1 the row of x_0 (0 to {n - 1}) that it is paired with"
    )


def _described(found: object) -> str:
    """What was returned, in an error's words."""
    match found:
        case Tensor():
            dtype = str(found.dtype).removeprefix("torch.")
            return f"a tensor of type {dtype} and shape {tuple(found.shape)}"
        case tuple() | list():
            return f"a {type(found).__name__} of {len(found)}"
        case None:
            return "None"
        case _:
            return f"a {type(found).__name__}"


def make_pairs(
    batches: Batches, flow: Flow, source: Source, config: TrainingConfig, rank: int
) -> Pairs:
    """The pairs that a flow asks for.

    Args:
        batches: Batches of the data, or of the pairs that a flow is given.
        flow: The flow.
        source: What x_0 is drawn from.
        config: The run's.
        rank: This process among those that share a batch.
    """
    if flow.given_pairs:
        return GivenPairs(batches, config, rank)
    if flow.couple:
        return CoupledPairs(batches, source, flow.couple, config, rank)
    return IndependentPairs(batches, source, config, rank)


def sample_times(n: int, config: TrainingConfig, device: torch.device) -> Tensor:
    """Times of a training step by the default generator, in [0, 1], shape (n,).

    logit-normal: the sigmoid of a normal variable (Esser et al., https://arxiv.org/abs/2403.03206,
    eq. 19).
    """
    match config.time_sampling:
        case "uniform":
            return torch.rand(n, device=device, dtype=torch.float32)
        case "logit-normal":
            drawn = torch.randn(n, device=device, dtype=torch.float32)
            return torch.sigmoid(config.time_mean + config.time_std * drawn)


def sample_path(flow: Flow, pair: Pair, t: Tensor, sigma: float, noise: Tensor | None) -> Pair:
    """The points x_t at times of shape (batch,) on the paths of a pair, and the velocities there.

    Args:
        flow: Which paths.
        pair: x_0 and x_1, each of shape (batch, *shape).
        t: Times in [0, 1], shape (batch,).
        sigma: Standard deviation around the paths.
        noise: Standard normal, of the shape of x_0; None where sigma is 0.

    Raises:
        ConfigError: A path of the user's own returns something else.
    """
    x_0, x_1 = pair
    found: object = flow.path(x_0, x_1, t.view(-1, *[1] * (x_0.dim() - 1)), sigma, noise)
    match found:
        case (Tensor() as x_t, Tensor() as dx_t):
            if all(part.shape == x_0.shape and part.is_floating_point() for part in (x_t, dx_t)):
                # torch has no gradient of a loss of two types. A model gets x_t in its own type.
                return x_t, dx_t.to(x_0.dtype)
            words = f"x_t as {_described(x_t)} and dx_t as {_described(dx_t)}"
        case _:
            words = _described(found)
    raise ConfigError(
        f"--flow: for x_0 of shape {tuple(x_0.shape)} the path returns {words}, expected "
        "(x_t, dx_t), both floats of that shape"
    )
