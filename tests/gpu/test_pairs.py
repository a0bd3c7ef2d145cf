"""Plans that a thread solves on a stream of its own, beside steps that are queued."""

import pytest
import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data.batches import Order, ResidentBatches
from flowjobs.data.dataset import FlowDataset
from flowjobs.data.source import NormalSource
from flowjobs.flows.coupling import exact
from flowjobs.flows.pairs import CoupledPairs

pytestmark = pytest.mark.gpu

STEPS, DIM = 60, 32


def pairs_of(config: TrainingConfig, device: torch.device) -> CoupledPairs:
    rows = torch.randn(700, DIM, generator=torch.Generator().manual_seed(0))
    order = Order(len(rows), config, 0, 1, device)
    mean, std = torch.zeros(DIM, device=device), torch.ones(DIM, device=device)
    batches = ResidentBatches(FlowDataset(rows), order, mean, std)
    return CoupledPairs(batches, NormalSource((DIM,)), exact, config, 0)


def copies(pairs: CoupledPairs, device: torch.device, *, busy: bool) -> list[tuple[Tensor, Tensor]]:
    """The pairs of each step, copied on the GPU after much else that it was asked for before."""
    large = torch.randn(4096, 4096, device=device)
    found = []
    for step in range(STEPS):
        x_0, x_1 = pairs.at(step)
        if busy:
            for _ in range(5):
                large = (large @ large).sin_()
        found.append((x_0.clone(), x_1.clone()))
    return found


@pytest.mark.parametrize("steps_at_once", [1, 3])
def test_pairs_are_the_same_as_without_a_thread_while_the_gpu_is_behind(
    device: torch.device, steps_at_once: int
) -> None:
    """An epoch's end is within some plans: 700 rows are ten batches."""
    common = {"flow": "otcfm", "batch_size": 64, "ot_batch": 64 * steps_at_once}
    beside = pairs_of(TrainingConfig(**common), device)
    alone = pairs_of(TrainingConfig(**common, num_workers=0), device)
    found = copies(beside, device, busy=True)
    expected = copies(alone, device, busy=False)
    for (x_0, x_1), (own_0, own_1) in zip(found, expected, strict=True):
        assert torch.equal(x_0, own_0)
        assert torch.equal(x_1, own_1)
