"""The validation loss: the same times and noise at each epoch, of each seed, of each attempt."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data.batches import normalized
from flowjobs.data.dataset import FlowDataset
from flowjobs.data.randomness import derive_seed, generator_for
from flowjobs.data.source import Source
from flowjobs.flows.flow import Flow, is_built_in
from flowjobs.flows.pairs import Pair, plan_of, sample_path
from flowjobs.models.velocity import Velocity, rows_at_once
from flowjobs.training.ranks import Ranks

# Rows that are drawn at once where the flow treats every row alone.
ROWS_AT_ONCE = 1024
# Size of x_t and dx_t together up to which they are kept on a GPU.
KEPT_BYTES = 2**28


class Validation:
    """Computes the flow-matching loss of a model on the validation part.

    The noise and times of a batch follow from its place alone, not from the run's seed: losses of
    two runs differ by the models, not by the draw. Times are uniform and rows as they are, however
    the training takes them.

    Args:
        dataset: The validation part; of a flow that is given its pairs, of these.
        flow: The flow; one that couples a batch validates in batches of the training's size, since
            the loss depends on it.
        source: What x_0 is drawn from.
        config: Gives sigma, and the size of a batch.
        mean: Mean of each column, of the shape of a row, on the device to compute on.
        std: Standard deviation of each column.
        ranks: The processes that share the work.

    Attributes:
        is_kept: Whether what the model is called on stays on the GPU, which would wait for it,
            where it is the same in each epoch.
    """

    def __init__(
        self,
        dataset: FlowDataset,
        flow: Flow,
        source: Source,
        config: TrainingConfig,
        mean: Tensor,
        std: Tensor,
        ranks: Ranks,
    ) -> None:
        self._dataset = dataset
        self._flow, self._source, self._sigma = flow, source, config.sigma
        self._mean, self._std = mean, std
        self._ranks = ranks
        rows = (config.ot_batch or config.batch_size) if flow.couple else ROWS_AT_ONCE
        starts = range(0, len(dataset), rows)
        self._called_on = rows_at_once(config, ranks.world_size, mean.numel())
        self._slices = [slice(start, min(start + rows, len(dataset))) for start in starts]
        # The plans of the batches, which are the same in each epoch.
        self._plans: dict[int, Tensor] = {}
        # A flow of the user's own may draw from the default generator, which each step seeds anew.
        fits = 2 * 4 * len(dataset) * dataset.dim <= KEPT_BYTES
        self.is_kept = mean.is_cuda and fits and is_built_in(config)
        self._kept: dict[int, Sequence[tuple[Tensor, ...]]] = {}

    def mean_of(self, total: Tensor) -> float:
        """The mean squared error over all rows and columns, of the `total` of each rank."""
        numbers = len(self._dataset) * self._dataset.dim
        if self._flow.given_pairs:
            numbers //= 2  # of a pair's two halves, one is predicted
        return float(self._ranks.sum(total)) / numbers

    @torch.no_grad()
    def total(self, velocity: Velocity, check: Callable[[], None] = lambda: None) -> Tensor:
        """The sum of the squared errors of the velocity over this rank's rows and all columns.

        Args:
            velocity: The model.
            check: Called between batches, on all ranks after as many; what it raises ends the
                validation.

        Returns:
            float64 of shape (), on the device.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._mean.device)
        for first in range(0, len(self._slices), self._ranks.world_size):
            if first:
                check()
            index = first + self._ranks.rank
            if index >= len(self._slices):
                break  # the others' last ones
            for x, time, dx in self._calls(index):
                # In memory of their own, which a model may change: what is kept comes again.
                found = velocity(x.clone(), time.clone())
                total += (found - dx).square().sum(dtype=torch.float64)
        return total

    def _calls(self, index: int) -> Sequence[tuple[Tensor, ...]]:
        """What the model is called on, and what it should give: x_t, t and dx_t."""
        if index in self._kept:
            return self._kept[index]
        device = self._mean.device
        generator = generator_for(device, "validation", index)
        x_0, x_1 = self._pair(index, generator)
        t = torch.rand(len(x_1), generator=generator, device=device, dtype=torch.float32)
        noise = None
        if self._flow.takes_noise and self._sigma > 0:
            noise = torch.randn(x_1.shape, generator=generator, device=device, dtype=torch.float32)
        x_t, dx_t = sample_path(self._flow, (x_0, x_1), t, self._sigma, noise)
        parts = (torch.split(part, self._called_on) for part in (x_t, t, dx_t))
        calls = [*zip(*parts, strict=True)]
        if self.is_kept:
            self._kept[index] = calls
        return calls

    def _pair(self, index: int, generator: torch.Generator) -> Pair:
        rows = normalized(self._dataset[self._slices[index]], self._mean, self._std)
        if self._flow.given_pairs:
            x_0, x_1 = rows.unbind(1)
            return x_0, x_1
        x_0 = self._source.draw(len(rows), generator, rows.device)
        if self._flow.couple:
            if index not in self._plans:
                seed = derive_seed("validation", index, "plan")
                self._plans[index] = plan_of(self._flow.couple, (x_0, rows), self._sigma, seed)
            x_0 = x_0[self._plans[index]]
        return x_0, rows
