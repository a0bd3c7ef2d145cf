"""Where the paths of a run start: noise, or rows of another dataset.

Rows of data are in units of the target's normalization, as everything that a model sees is: source
and target are mapped alike, and stay where they are to one another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data.batches import normalized
from flowjobs.data.dataset import FlowDataset, content_by_part, load_datasets
from flowjobs.data.randomness import generator_for
from flowjobs.runs.data_file import DataContent
from flowjobs.runs.datasets import SOURCE, check_source

CPU = torch.device("cpu")


class Source(Protocol):
    """What x_0 is drawn from.

    Attributes:
        rows: How many rows it has, so that more starts are not all different; None: no end.
    """

    rows: int | None

    def draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Independent draws on the device, shape (n, *shape), float32.

        Args:
            n: How many.
            generator: The device's; None is its default one.
            device: Where they are wanted.
        """
        ...

    def starts(self, seed: int, chunk: int, size: int) -> Tensor:
        """Where the samples of a chunk of this size start, on the CPU, shape (size, *shape)."""
        ...


class NormalSource:
    """Standard normal noise."""

    rows: int | None = None

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """See `Source`."""
        return torch.randn(
            (n, *self._shape), generator=generator, device=device, dtype=torch.float32
        )

    def starts(self, seed: int, chunk: int, size: int) -> Tensor:
        """See `Source`."""
        return self.draw(size, generator_for(CPU, seed, "samples", chunk), CPU)


class RowSource:
    """Rows of a dataset.

    Args:
        dataset: The rows.
        mean: Mean of the target, on the CPU.
        std: Its standard deviation.
    """

    def __init__(self, dataset: FlowDataset, mean: Tensor, std: Tensor) -> None:
        self._dataset = dataset
        self.rows: int | None = len(dataset)
        self._mean, self._std = mean, std

    def draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """See `Source`. A row may come twice."""
        at = torch.device("cpu") if generator is None else generator.device
        index = torch.randint(len(self._dataset), (n,), generator=generator, device=at)
        return self._rows(index).to(device)

    def starts(self, seed: int, chunk: int, size: int) -> Tensor:
        """See `Source`. Every row once, before one comes again."""
        generator = generator_for(CPU, seed, "samples")
        order = torch.randperm(len(self._dataset), generator=generator, device=CPU)
        places = torch.arange(chunk * size, (chunk + 1) * size, device=CPU)
        return self._rows(order[places % len(order)])

    def _rows(self, index: Tensor) -> Tensor:
        return normalized(self._dataset[index.cpu()], self._mean, self._std)


@dataclass(frozen=True)
class Sources:
    """What a run's x_0 are drawn from.

    Attributes:
        training: In training.
        held_out: In validation, and for samples.
        content: What the files hold that they are read from, by part.
    """

    training: Source
    held_out: Source
    content: dict[str, DataContent]


def sources_of(config: TrainingConfig, study: Path, mean: Tensor, std: Tensor) -> Sources:
    """The sources of a run.

    Args:
        config: The run's.
        study: Where the datasets are.
        mean: Mean of the run's data, of the shape of a row.
        std: Standard deviation of it.

    Raises:
        DataError: `--source` cannot be read, or is of another shape than the data.
    """
    if config.source == "normal":
        noise = NormalSource(tuple(mean.shape))
        return Sources(noise, noise, {})
    train, val = load_datasets(config.source, study, "--source")
    check_source(config.source, train.shape, tuple(mean.shape))
    mean, std = mean.cpu(), std.cpu()
    content = {f"{SOURCE}{part}": of for part, of in content_by_part(train, val).items()}
    return Sources(RowSource(train, mean, std), RowSource(val, mean, std), content)
