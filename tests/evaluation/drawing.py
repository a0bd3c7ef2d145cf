"""Samples of a bare model, as tests want them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowjobs.data.source import NormalSource
from flowjobs.evaluation.sampling import CHUNK, Samples, joined, sample_chunks
from flowjobs.evaluation.solver import Solver


def sample(
    model: nn.Module,
    n: int,
    stats: Mapping[str, Tensor],
    device: torch.device,
    seed: int = 0,
    solver: Solver = Solver(),  # noqa: B008, it is frozen
    at_once: int = CHUNK,
) -> Samples:
    """Draw n samples of a model, from noise. The arguments are those of `sample_chunks`."""
    source = NormalSource(tuple(stats["mean"].shape))
    options = {"source": source, "at_once": at_once}
    return joined(list(sample_chunks(model, n, stats, device, seed, solver, **options)))
