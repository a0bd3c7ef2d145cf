"""The batches of a run: which rows step s takes, on the device or read from the file.

Both ways give the same bits: the rows of a step follow from the seed and the step alone.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data.dataset import FlowDataset
from flowjobs.data.memory import free_memory_bytes
from flowjobs.data.randomness import epoch_order
from flowjobs.data.read_ahead import ReadAhead
from flowjobs.runs.datasets import rows_per_step
from flowjobs.slots import runs_that_share

# Share of the free memory that resident data may take; the rest is for the model's activations.
RESIDENT_SHARE = 0.5


class Batches(Protocol):
    """Normalized training rows by step."""

    steps_per_epoch: int
    device: torch.device

    def rows(self, step: int) -> Tensor:
        """This rank's rows of the step (0 is the first), on the device, shape (n, *shape)."""
        ...


class Order:
    """Which rows each rank takes at each step.

    An epoch is a permutation of all rows, cut into global batches; what does not fill one is left
    out of that epoch. Each rank takes its own part of a global batch.

    Args:
        n: Rows of the training data.
        config: Gives the seed and the global batch size.
        rank: This process among those that share a batch, from 0.
        world_size: How many there are.
        device: Where the indices are wanted; an epoch's are copied there at once.

    Raises:
        ConfigError: The batch cannot be shared equally.
    """

    def __init__(
        self, n: int, config: TrainingConfig, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.batch_size = rows_per_step(config.batch_size, n, world_size)
        self.steps_per_epoch = n // self.batch_size
        self._n = n
        self._seed = config.seed
        self._share = self.batch_size // world_size
        self._offset = rank * self._share
        self._device = device
        # The epoch and its rows; one value, since Ctrl-C in a notebook may come between two.
        self._permutation = (-1, torch.empty(0, dtype=torch.int64, device="cpu"))

    def indices(self, step: int) -> Tensor:
        """The rows that this rank takes at `step`, int64 of shape (batch_size / world_size,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        # Made anew from the seed, never carried over: a restart at any step gets the same order.
        if epoch != self._permutation[0]:
            order = epoch_order(self._n, self._seed, epoch)
            if self._device.type == "cuda":  # from other memory the copy waits for the steps before
                order = order.pin_memory().to(self._device, non_blocking=True)
            self._permutation = (epoch, order)
        start = position * self.batch_size + self._offset
        return self._permutation[1][start : start + self._share]


class ResidentBatches:
    """All rows normalized on the device once, and indexed there."""

    def __init__(self, dataset: FlowDataset, order: Order, mean: Tensor, std: Tensor) -> None:
        self.steps_per_epoch = order.steps_per_epoch
        self.device = mean.device
        shape = (len(dataset), *dataset.shape)
        # Filled part by part, so that no second copy of all rows has to fit beside it.
        self._data = torch.empty(shape, device=mean.device, dtype=torch.float32)
        for indices, rows in dataset.in_order_of_file():
            self._data[indices.to(mean.device)] = normalized(rows, mean, std)
        self._order = order

    def rows(self, step: int) -> Tensor:
        """See `Batches`."""
        return self._data.index_select(0, self._order.indices(step))


class LoadedBatches:
    """Rows read ahead of their steps, for data that does not fit on the device."""

    def __init__(
        self,
        dataset: FlowDataset,
        order: Order,
        mean: Tensor,
        std: Tensor,
        num_workers: int,
    ) -> None:
        self.steps_per_epoch = order.steps_per_epoch
        self.device = mean.device
        self._dataset = dataset
        self._order = order
        self._mean, self._std = mean, std
        self._num_workers = num_workers
        self._next_step = -1
        self._coming: ReadAhead[Tensor] | None = None

    def rows(self, step: int) -> Tensor:
        """See `Batches`. Steps that follow one another are read ahead."""
        if self._coming is None or step != self._next_step:
            self._coming = ReadAhead(self._reads_from(step), self._num_workers, self._dataset.name)
        self._next_step = step + 1
        return normalized(self._coming.next(), self._mean, self._std)

    def _reads_from(self, step: int) -> Iterator[Callable[[], Tensor]]:
        for coming in itertools.count(step):
            yield partial(self._read, self._order.indices(coming))

    def _read(self, indices: Tensor) -> Tensor:
        rows = self._dataset[indices]
        # Only from pinned memory does the copy below run beside the step that is under way.
        return rows.pin_memory() if self._mean.is_cuda else rows


def normalized(rows: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """A copy of the rows, shape (n, *shape), on the device of `mean`: centred, in units of std.

    Computed in the type of `mean`, and then float32.
    """
    # copy=True: on the CPU `to` may give the dataset's own memory, which the next line changes.
    copied = rows.to(mean.device, mean.dtype, non_blocking=True, copy=True)
    return copied.sub_(mean).div_(std).float()


def make_batches(
    dataset: FlowDataset,
    config: TrainingConfig,
    rank: int,
    world_size: int,
    mean: Tensor,
    std: Tensor,
) -> Batches:
    """Resident batches where the data fits on the device of `mean`, else loaded ones."""
    match config.data_placement:
        case "device":
            resident = True
        case "loader":
            resident = False
        case "auto":
            # 4 bytes a float32, which is what stays, whatever the file's type.
            resident = 4 * len(dataset) * dataset.dim <= RESIDENT_SHARE * _free_bytes(mean.device)
    if resident:
        order = Order(len(dataset), config, rank, world_size, mean.device)
        return ResidentBatches(dataset, order, mean, std)
    # The host reads the rows: indices on the GPU would have to come back for each step.
    order = Order(len(dataset), config, rank, world_size, torch.device("cpu"))
    return LoadedBatches(dataset, order, mean, std, config.num_workers)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // runs_that_share()
    return free_memory_bytes()
