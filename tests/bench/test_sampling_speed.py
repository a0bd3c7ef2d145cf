"""Samples a second against a loop written by hand: same network, solver and batch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flowjobs.evaluation.sampling import CHUNK
from flowjobs.evaluation.solver import Solver
from flowjobs.models.mlp import MLP
from tests.bench.ratios import paired_ratios
from tests.evaluation.drawing import sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = [
    pytest.mark.bench,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a run of this size takes by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def midpoint_loop(model: nn.Module, n: int, steps: int) -> Tensor:
    """What a user would write."""
    batches = []
    for _ in range(n // CHUNK):
        x = torch.randn(CHUNK, 64, device=DEVICE)
        for step in range(steps):
            t = torch.full((CHUNK,), step / steps, device=DEVICE)
            middle = x + model(x, t) / (2 * steps)
            x = x + model(middle, t + 1 / (2 * steps)) / steps
        batches.append(x.cpu())
    return torch.cat(batches)


def test_sampling_is_as_fast_as_a_loop_by_hand() -> None:
    torch.manual_seed(0)
    model = MLP(64).to(DEVICE).eval()
    stats = {"mean": torch.zeros(64), "std": torch.ones(64)}
    n = 2 * CHUNK
    ratios = paired_ratios(
        lambda: sample(model, n, stats, DEVICE, solver=Solver("midpoint", 50)),
        {"loop by hand": lambda: midpoint_loop(model, n, 50)},
        rounds=25,
    )
    assert ratios["loop by hand"] >= 0.97
