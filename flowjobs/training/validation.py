"""The validation loss: the same times and noise at each epoch, of each seed, of each attempt."""

import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data.batches import normalized
from flowjobs.data.dataset import FlowDataset
from flowjobs.data.randomness import generator_for
from flowjobs.flows.path import sample_path
from flowjobs.models.velocity import Velocity
from flowjobs.training.ranks import Ranks

# Rows of a batch where the flow treats every row alone.
ROWS_AT_ONCE = 1024


class Validation:
    """Computes the flow-matching loss of a model on the validation part.

    The noise and times of a batch follow from its place alone, not from the run's seed: losses of
    two runs differ by the models, not by the draw.

    Args:
        dataset: The validation part.
        config: Gives the flow; one that couples a batch validates in batches of the training's
            size, since the loss depends on it.
        mean: Mean of each column, shape (dim,), on the device to compute on.
        std: Standard deviation of each column, shape (dim,).
        ranks: The processes that share the work.
    """

    def __init__(
        self,
        dataset: FlowDataset,
        config: TrainingConfig,
        mean: Tensor,
        std: Tensor,
        ranks: Ranks,
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._mean, self._std = mean, std
        self._ranks = ranks
        rows = config.batch_size if config.flow == "otcfm" else ROWS_AT_ONCE
        starts = range(0, len(dataset), rows)
        self._slices = [slice(start, min(start + rows, len(dataset))) for start in starts]

    @torch.no_grad()
    def loss(self, velocity: Velocity) -> float:
        """The mean squared error of the velocity over all rows and columns."""
        device = self._mean.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for index in range(self._ranks.rank, len(self._slices), self._ranks.world_size):
            x_1 = normalized(self._dataset[self._slices[index]], self._mean, self._std)
            generator = generator_for(device, "validation", index)
            x_0 = torch.randn(x_1.shape, generator=generator, device=device, dtype=x_1.dtype)
            t = torch.rand(len(x_1), generator=generator, device=device, dtype=x_1.dtype)
            noise = None
            if self._config.sigma > 0:
                noise = torch.randn(x_1.shape, generator=generator, device=device, dtype=x_1.dtype)
            path = sample_path(self._config.flow, x_0, x_1, t, self._config.sigma, noise)
            error = velocity(path.x_t, path.t) - path.dx_t
            total += error.square().sum(dtype=torch.float64)
        return float(self._ranks.sum(total)) / (len(self._dataset) * self._dataset.dim)
