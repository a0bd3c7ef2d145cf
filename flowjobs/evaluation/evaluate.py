"""Measures of a trained model's samples, beside what real data would score.

Written as a run's `evaluation.json`:

    name, step       the run, and the step that its best.pt is of
    n, repeats       samples of each repeat, and how many repeats: other noise and other rows
    seed             of the first repeat's noise; the rows are the same for all models
    solver, nfe      in words, and network calls a sample
    nearest_among    training rows that the nearest one is looked for among
    measures         by name: {"value", "std", "floor", "lower_is_better", "best", "note"}; the mean
                     and standard deviation over the repeats (null for one repeat);
                     `lower_is_better` is null where neither is better; `best` is what a perfect
                     model scores where values beyond it are worse again, else null; `note` is what
                     to beware of, or null
    by_nfe           by network calls ("1", "2", … "64": Euler's steps; "dopri5"): values by name,
                     of the first repeat; what could not be sampled is left out
    nfe_of_dopri5    network calls that it took, or null

Each value compares n samples with n rows of the validation part; its floor, n rows of the training
part with the same n rows. So a floor is what a perfect model would score, and a difference much
smaller than the floor's own deviation means nothing. Values of another n are not comparable.

    sliced_wasserstein wasserstein2 mmd energy_distance frechet c2st precision recall density
    coverage         see `measures`; wasserstein2 up to SMALL_DIM dimensions, c2st where asked for
    path_energy npe  up to SMALL_DIM dimensions: the integral of the squared velocity, in normalized
                     data, and |path_energy - W2²| / W2², W2 the exact distance between the noise
                     and the validation rows. Floors: W2², and how far W2² itself is known. No npe
                     where the paths start at the rows where they end
    nn_train         mean distance of a sample to the nearest row of the training part; its floor
                     is that of validation rows. Far below it: training rows are reproduced
    memorization     share of samples that are nearer to a training row than to any validation row:
                     1 for a model that returns what it was trained on. Its floor is the training
                     rows' share of both, which one that has memorized none scores by chance; so
                     counts a sample that is as near to both (to a row that both have)
"""

import functools
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowjobs.data.batches import normalized
from flowjobs.data.dataset import FlowDataset, rows_of_chunk
from flowjobs.data.memory import free_memory_bytes
from flowjobs.data.randomness import generator_for
from flowjobs.data.source import Source
from flowjobs.errors import ConfigError, DataError, SamplingError
from flowjobs.evaluation import measures
from flowjobs.evaluation.sampling import CHUNK, Samples, joined
from flowjobs.evaluation.solver import EULER_STEPS, Solver, check_steps
from flowjobs.evaluation.trained import TrainedModel

logger = logging.getLogger(__name__)

# Up to here n points tell the exact transport cost well enough: its bias falls as n^(-2/dim).
SMALL_DIM = 4
FEWEST = measures.K_NEAREST + 1
# What that takes of memory for each pair of points: the costs, the plan and the solver's arcs.
TRANSPORT_BYTES = 45

HIGHER_IS_BETTER = frozenset({"precision", "recall", "density", "coverage"})
# Paths of less energy than the shortest lead nowhere near the data; npe ranks them.
NEITHER_IS_BETTER = frozenset({"nn_train", "path_energy"})
# Chance: a classifier that is wrong more often than not tells samples from data as well.
BEST = {"c2st": 0.5}
# Those of normalized data, and of a classifier that normalizes.
FREE_OF_UNITS = frozenset({"c2st", "path_energy", "npe"})
# The share of the variance with which columns decide alone what is near.
DECIDES = 0.9
# Two distances are the same if they differ by less than this part of the data's deviation.
TIE = 1e-6
# Rows are the same if the squared distance is below this, in normalized data: float32 has 1e-7.
SAME_ROWS = 1e-10

# Value and floor by name.
_Pairs = dict[str, tuple[float, float]]

# What the data alone score, by the name of the measure and the repeat. Models of the same data,
# source and normalization that are evaluated with one of these compute it once.
Floors = dict[tuple[str, int], Any]


@dataclass(frozen=True)
class Scope:
    """How much is computed.

    Attributes:
        n: Samples of a repeat; None: as many as there are validation rows (of the source too),
            at most `at_most`.
        at_most: See `n`.
        repeats: How often to measure, each time with other noise and rows.
        with_c2st: Train a classifier, which takes longer than all else.
        nearest_among: Training rows that the nearest one is looked for among, at most.
        solver: For all but the curve over NFE.
        euler_steps: For the curve, beside dopri5; none: no curve.
        seed: Seed of the noise.
    """

    n: int | None = None
    at_most: int = 2000
    repeats: int = 5
    with_c2st: bool = True
    nearest_among: int = 100_000
    solver: Solver = Solver()  # noqa: RUF009, it is frozen
    euler_steps: tuple[int, ...] = EULER_STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n is not None and self.n < FEWEST:
            raise ConfigError(f"-n: found {self.n}, expected at least {FEWEST}")
        if self.repeats < 1:
            raise ConfigError(f"--repeats: found {self.repeats}, expected at least 1")
        for steps in self.euler_steps:
            check_steps("--nfe", steps)

    def rows(self, train: FlowDataset, val: FlowDataset, source: Source) -> int:
        """The n that the data and the source allow.

        Two samples of one start are one point, which no real data have: to most measures that is a
        collapse, and the floor knows nothing of it.

        Raises:
            ConfigError, DataError: There are too few rows, or too many for the memory.
        """
        there, starts = min(len(train), len(val)), source.rows
        at_most = there if starts is None else min(there, starts)
        if self.n is not None and self.n > at_most:
            of_source = "" if starts is None else f", from {starts} held-out rows of the source"
            raise ConfigError(
                f"-n: found {self.n}, expected at most {at_most}: as many rows of the training "
                f"part ({len(train)}) and of the validation part ({len(val)}) are compared"
                f"{of_source}"
            )
        if at_most < FEWEST:
            where = "training part too" if at_most == there else "validation part of the source"
            raise DataError(
                f"{val.name}: {at_most} rows are too few to compare samples with: expected at "
                f"least {FEWEST}, in the {where}"
            )
        n = self.n or min(at_most, self.at_most)
        needed, free = TRANSPORT_BYTES * n**2, free_memory_bytes()
        if val.dim <= SMALL_DIM and needed > free:
            raise ConfigError(
                f"-n: found {n}, whose exact transport (wasserstein2) takes {needed / 1e9:.1f} GB, "
                f"and {free / 1e9:.1f} GB are free: give fewer"
            )
        return n


# At the end of every run: one chunk of samples a repeat, and nothing that is slow to load.
QUICK = Scope(
    at_most=CHUNK,
    repeats=2,
    with_c2st=False,
    nearest_among=10_000,
    solver=Solver("midpoint", 25),
)


def evaluate(
    trained: TrainedModel,
    train: FlowDataset,
    val: FlowDataset,
    scope: Scope,
    check: Callable[[], None] = lambda: None,
    floors: Floors | None = None,
) -> dict[str, Any]:
    """Sample a model and measure the samples.

    Args:
        trained: The model.
        train: The training part of its data.
        val: The validation part.
        scope: How much to compute.
        check: Called between measures and network calls; what it raises ends the evaluation.
        floors: From another model of the same data, source, normalization and scope; is added to.

    Returns:
        What `evaluation.json` holds.

    Raises:
        SamplingError: The model cannot be sampled.
        ConfigError, DataError: There are too few rows, or too many for the memory.
    """
    work = _Evaluation(trained, train, val, scope, check, {} if floors is None else floors)
    repeats = [work.repeat(number) for number in range(scope.repeats)]
    by_nfe, nfe_of_dopri5 = work.by_nfe()
    pairs = [found for found, _ in repeats]
    return {
        "name": trained.name,
        "step": trained.step,
        "n": work.n,
        "repeats": scope.repeats,
        "seed": scope.seed,
        "solver": str(scope.solver),
        "nearest_among": min(scope.nearest_among, len(train)),
        "nfe": statistics.fmean(nfe for _, nfe in repeats),
        "measures": {
            name: _summary(name, [found[name] for found in pairs], work.note(name))
            for name in pairs[0]
            if all(name in found for found in pairs)
        },
        "by_nfe": by_nfe,
        "nfe_of_dopri5": nfe_of_dopri5,
    }


def _summary(name: str, pairs: list[tuple[float, float]], note: str | None) -> dict[str, Any]:
    values, floors = zip(*pairs, strict=True)
    return {
        "value": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "floor": statistics.fmean(floors),
        "lower_is_better": None if name in NEITHER_IS_BETTER else name not in HIGHER_IS_BETTER,
        "best": floors[0] if name == "memorization" else BEST.get(name),
        "note": note,
    }


class _Evaluation:
    """One model's, with the data that it is compared with."""

    def __init__(
        self,
        trained: TrainedModel,
        train: FlowDataset,
        val: FlowDataset,
        scope: Scope,
        check: Callable[[], None],
        floors: Floors,
    ) -> None:
        self.n = scope.rows(train, val, trained.source)
        self._floors = floors
        self._trained, self._scope, self._check = trained, scope, check
        self._train, self._val = train, val
        self._is_small = val.dim <= SMALL_DIM

    def repeat(self, number: int) -> tuple[_Pairs, float]:
        """Values and floors for the noise and rows of one repeat, and the network calls."""
        samples = self._sample(self._scope.seed + number, self._scope.solver, self._is_small)
        x, y, held = self._points(samples), self._reference(number), self._held(number)
        found: _Pairs = {}
        for name, measure in self._distances(with_c2st=self._scope.with_c2st):
            self._check()
            floor = self._known(name, number, functools.partial(measure, held, y))
            found[name] = measure(x, y), floor
        self._check()
        of_samples = measures.prdc(x, y)
        of_data = self._known("prdc", number, functools.partial(measures.prdc, held, y))
        found |= {name: (of_samples[name], of_data[name]) for name in of_samples}
        if samples.path_energy is not None:
            found |= self._energies(samples, number)
        return found | self._neighbours(x, y, number), samples.nfe

    def note(self, name: str) -> str | None:
        """What to beware of at a measure."""
        among, there = self._scope.nearest_among, len(self._train)
        if name == "frechet" and self.n <= self._val.dim:
            return (
                f"{self.n} points are no more than the {self._val.dim} dimensions, so that their "
                "covariances are singular: most of the value is the floor's; give more (-n)"
            )
        if name in HIGHER_IS_BETTER and self._often:
            return (
                f"{self._often} of {self.n} validation rows are there more than "
                f"{measures.K_NEAREST} times: of samples near them only exact copies are counted"
            )
        if name in ("nn_train", "memorization") and among < there:
            return f"{among} of {there} training rows were looked at: copies of others are not seen"
        return None if name in FREE_OF_UNITS else self._decided_by

    @functools.cached_property
    def _decided_by(self) -> str | None:
        """That few columns decide every distance, if they do, since their units are small.

        A tenth of the columns, or one: an image has its variance in more of the pixels that change
        at all, and no column of the two-dimensional sets has so much of it.
        """
        variance, columns = self._reference(0).var(0).sort(descending=True)
        there, whole = int((variance > 0).sum()), variance.sum()
        few = int((variance.cumsum(0) <= DECIDES * whole).sum()) + 1
        if not few <= max(1, there // 10) < there:
            return None
        has = f"column {columns[0]} has" if few == 1 else f"{few} of {there} columns have"
        percent = math.floor(1000 * variance[:few].sum() / whole) / 10
        return f"{has} {percent} % of the variance: distances tell hardly anything of the others"

    @functools.cached_property
    def _often(self) -> int:
        """Validation rows whose nearest neighbours, by which closeness is told, are themselves."""
        _, counts = torch.unique(self._reference(0), dim=0, return_counts=True)
        return int(counts[counts > measures.K_NEAREST].sum())

    def by_nfe(self) -> tuple[dict[str, dict[str, float]], float | None]:
        """Values by network calls, for the first repeat's noise and rows; the calls of dopri5."""
        solvers = {str(steps): Solver("euler", steps) for steps in self._scope.euler_steps}
        if solvers:
            solvers["dopri5"] = Solver("dopri5")
        y = self._reference(0)
        found: dict[str, dict[str, float]] = {}
        nfe = {}
        for key, solver in solvers.items():
            try:
                samples = self._sample(self._scope.seed, solver)
            except SamplingError as error:
                logger.warning("%s", error)
                continue
            x, nfe[key] = self._points(samples), samples.nfe
            found[key] = {}
            for name, measure in self._distances():
                self._check()
                found[key][name] = measure(x, y)
        return found, nfe.get("dopri5")

    def _distances(
        self, *, with_c2st: bool = False
    ) -> Iterator[tuple[str, Callable[[Tensor, Tensor], float]]]:
        """The measures that are one number of two clouds; less is better."""
        yield "sliced_wasserstein", measures.sliced_wasserstein
        if self._is_small:
            yield "wasserstein2", measures.wasserstein2
        yield "mmd", measures.mmd
        yield "energy_distance", measures.energy_distance
        yield "frechet", measures.frechet
        if with_c2st:
            yield "c2st", measures.c2st

    def _energies(self, samples: Samples, number: int) -> _Pairs:
        """How much longer the paths are than the shortest that lead from the noise to the data."""
        assert samples.path_energy is not None
        energy = float(samples.path_energy.double().mean())
        x_0 = samples.x_0.flatten(1).double()
        stats = self._trained.stats
        mean, std = (stats[key].double().cpu().flatten() for key in ("mean", "std"))

        def squared_distance(points: Tensor) -> float:
            """From the noise to these rows."""
            self._check()
            return measures.squared_wasserstein2(x_0, normalized(points.cpu(), mean, std).double())

        least, other = (
            self._known(name, number, functools.partial(squared_distance, points))
            for name, points in (
                ("to validation", self._reference(number)),
                ("to training", self._held(number)),
            )
        )
        found = {"path_energy": (energy, least)}
        if least > SAME_ROWS:  # else the paths start at the very rows where they end
            found["npe"] = abs(energy - least) / least, abs(other - least) / least
        return found

    def _neighbours(self, x: Tensor, y: Tensor, number: int) -> _Pairs:
        """How near the samples are to the rows that the model has seen."""
        among = self._scope.nearest_among
        to_train, to_val = (
            self._nearest(x, part, "nearest", among) for part in (self._train, self._val)
        )
        seen, held_out = (min(among, len(part)) for part in (self._train, self._val))
        chance = seen / (seen + held_out)
        apart = to_train - to_val
        # Within the columns: how far their means are apart says nothing of distances.
        deviation = (y - y.mean(0)).square().mean().sqrt()
        tied = apart.abs() < TIE * deviation
        nearer = torch.where(tied, chance, (apart < 0).double())

        def of_data() -> float:
            return float(self._nearest(y, self._train, "nearest", among).mean())

        return {
            "nn_train": (float(to_train.mean()), self._known("nn_train", number, of_data)),
            "memorization": (float(nearer.mean()), chance),
        }

    def _nearest(self, points: Tensor, dataset: FlowDataset, purpose: str, n: int) -> Tensor:
        """The distance of each point to the nearest of n rows, of which few are held at once."""
        # Their distances to all points are held too.
        at_once = rows_of_chunk(max(dataset.dim, len(points)))
        parts = torch.split(self._order(dataset, purpose, n).sort().values, at_once)
        found = []
        for part in parts:
            self._check()
            found.append(measures.nearest_distances(points, self._of(dataset, part)))
        return torch.stack(found).amin(0)

    def _sample(self, seed: int, solver: Solver, with_energy: bool = False) -> Samples:
        chunks = self._trained.chunks(
            self.n, seed, solver, with_energy=with_energy, check=self._check
        )
        return joined(list(chunks))

    def _known(self, name: str, number: int, compute: Callable[[], Any]) -> Any:
        """What only the data decide, from another model's evaluation if that has it."""
        if (name, number) not in self._floors:
            self._floors[name, number] = compute()
        return self._floors[name, number]

    def _reference(self, number: int) -> Tensor:
        return self._rows(self._val, f"reference {number}", self.n)

    def _held(self, number: int) -> Tensor:
        """Real rows in the place of samples."""
        return self._rows(self._train, f"floor {number}", self.n)

    def _rows(self, dataset: FlowDataset, purpose: str, n: int) -> Tensor:
        return self._of(dataset, self._order(dataset, purpose, n))

    def _order(self, dataset: FlowDataset, purpose: str, n: int) -> Tensor:
        """The indices of n rows, the same for every model."""
        generator = generator_for(torch.device("cpu"), "evaluation", purpose)
        return torch.randperm(len(dataset), generator=generator, device="cpu")[:n]

    def _of(self, dataset: FlowDataset, index: Tensor) -> Tensor:
        return dataset[index].flatten(1).double().to(self._trained.device)

    def _points(self, samples: Samples) -> Tensor:
        return samples.x_1.flatten(1).double().to(self._trained.device)
