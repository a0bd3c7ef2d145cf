"""What the steps of a run read: its rows or the pairs of reflow, and what x_0 are drawn from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data.dataset import (
    FlowDataset,
    content_by_part,
    no_normalization,
    normalization_stats,
)
from flowjobs.data.source import Sources, sources_of
from flowjobs.errors import DataError, RunInterrupted
from flowjobs.flows.flow import Flow
from flowjobs.runs.data_file import DataContent
from flowjobs.runs.datasets import PAIRS
from flowjobs.training.ranks import Ranks
from flowjobs.training.reflow import pairs_of


@dataclass(frozen=True)
class Inputs:
    """What the steps of a run read.

    Attributes:
        train: Rows of shape (*shape), or given pairs, (2, *shape).
        val: The same for validation.
        mean: What `train` is normalized by, on the device, of the shape of its rows.
        std: The same.
        stats: Normalization of the run's data, also where the pairs are made: samples undo it.
        sources: What x_0 are drawn from.
        content: What all files that are read hold, by part.
    """

    train: FlowDataset
    val: FlowDataset
    mean: Tensor
    std: Tensor
    stats: dict[str, Tensor]
    sources: Sources
    content: dict[str, DataContent]


def inputs_of(
    config: TrainingConfig,
    flow: Flow,
    study: Path,
    data: tuple[FlowDataset, FlowDataset],
    device: torch.device,
    ranks: Ranks,
    stop_reason: Callable[[], str | None],
    prepared: Callable[[], None],
) -> Inputs:
    """The inputs of a run. Pairs that are not there yet are made, on the first rank.

    Args:
        config: The run's.
        flow: The config's.
        study: Where the datasets are.
        data: The training and the validation part.
        device: Where to compute.
        ranks: The processes that train together.
        stop_reason: Asked while pairs are made.
        prepared: Called when some more of them are there.

    Raises:
        FlowjobsError: Something in it cannot be read, or does not fit the data.
        RunInterrupted: `stop_reason` asked to leave.
    """
    for part, given in zip(("training", "validation"), data, strict=True):
        if not isinstance(given, FlowDataset):
            raise DataError(
                f"the {part} part is a {type(given).__name__}, expected a FlowDataset of its rows: "
                "flowjobs.training.FlowDataset(rows)"
            )
    train, val = data
    if train.shape != val.shape:
        raise DataError(
            f"the training part has rows of shape {train.shape}, the validation part of shape "
            f"{val.shape}: both must be of one shape"
        )
    stats = (normalization_stats if config.normalize == "columns" else no_normalization)(train)
    mean, std = stats["mean"].to(device), stats["std"].to(device)
    sources = sources_of(config, study, mean, std)
    content = content_by_part(train, val) | sources.content
    if flow.given_pairs:
        sizes = len(train), len(val)
        with ranks.first_goes_first() as still_at_it:

            def check() -> None:
                if reason := stop_reason():
                    raise RunInterrupted(reason)
                still_at_it()

            train, val = pairs_of(
                config, study, sizes, stats, sources, content, device, check, prepared
            )
        pairs = content_by_part(train, val)
        content |= {f"{PAIRS}{part}": of for part, of in pairs.items()}
        as_made = no_normalization(train)  # they are normalized already
        mean, std = as_made["mean"].to(device), as_made["std"].to(device)
    return Inputs(train, val, mean, std, stats, sources, content)
