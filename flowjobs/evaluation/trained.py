"""A trained model to sample from."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn

from flowjobs.config import TrainingConfig
from flowjobs.data.source import Source
from flowjobs.errors import ConfigError
from flowjobs.evaluation.sampling import Samples, joined, sample_chunks
from flowjobs.evaluation.solver import DEFAULT_STEPS, DEFAULT_TOLERANCE, Method, Solver
from flowjobs.models.velocity import rows_at_once


@dataclass(frozen=True)
class TrainedModel:
    """The best checkpoint of a run.

    Attributes:
        name: The run's name.
        model: The velocity at (x, t), with the averaged weights (EMA), in evaluation mode; of
            normalized data.
        stats: Normalization of the data: `mean` and `std`, each of the shape of a row.
        config: What was trained.
        step: Optimizer steps that it is the best of.
        device: Where the model is.
        source: Where its paths start.
        threads: On the CPU, of which the last bits of a sample depend; None: as torch is set.
        ranks: Processes that shared a batch in training.
    """

    name: str
    model: nn.Module
    stats: Mapping[str, Tensor]
    config: TrainingConfig
    step: int
    device: torch.device
    source: Source
    threads: int | None = None
    ranks: int = 1

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        solver: Method = "midpoint",
        steps: int = DEFAULT_STEPS,
        tolerance: float = DEFAULT_TOLERANCE,
    ) -> Tensor:
        """Draw samples.

        Args:
            n: How many. With --source, those beyond its held-out rows start where earlier ones do.
            seed: Seed of the source. A sample follows from it and its index, whatever n is.
            solver: euler, midpoint, heun, rk4, or dopri5, which chooses its steps.
            steps: Steps from source to data; of no effect with dopri5.
            tolerance: Error that dopri5 allows in each step.

        Returns:
            The samples in the data's own units, on the CPU, shape (n, *shape).

        Raises:
            SamplingError: A sample is not finite, or dopri5 does not get to the end.
            ConfigError: There is no such solver, or no such number of samples.
        """
        if not (isinstance(n, Integral) and n >= 1):
            raise ConfigError(f"n: found {n!r}, expected at least 1")
        with self.on_its_threads():
            return joined(list(self.chunks(n, seed, Solver(solver, steps, tolerance)))).x_1

    @contextmanager
    def on_its_threads(self) -> Iterator[None]:
        """Compute with the model's number of threads while the block lasts."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def chunks(
        self,
        n: int,
        seed: int,
        solver: Solver,
        *,
        with_energy: bool = False,
        check: Callable[[], None] = lambda: None,
        first: int = 0,
    ) -> Iterator[Samples]:
        """The samples of `sample`, as they are computed; see `sample_chunks`."""
        return sample_chunks(
            self.model,
            n,
            self.stats,
            self.device,
            seed,
            solver,
            source=self.source,
            with_energy=with_energy,
            check=check,
            first=first,
            at_once=rows_at_once(self.config, self.ranks, self.stats["mean"].numel()),
        )
