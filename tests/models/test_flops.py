"""FLOPs and parameters, counted without touching the model or its random numbers."""

import pytest
import torch
from torch import Tensor, nn

from flowjobs.models.dit import DiT
from flowjobs.models.flops import flops_per_sample, parameters_in
from flowjobs.models.mlp import MLP


def test_the_flops_of_a_model_are_those_of_its_products() -> None:
    model = MLP(5, width=8, depth=1, time_width=4)
    products = [weights.numel() for weights in model.parameters() if weights.ndim == 2]
    assert flops_per_sample(model, (5,)) == 2 * sum(products)
    assert parameters_in(model) == sum(weights.numel() for weights in model.parameters())
    tokens, width = 4, 16
    one, two = (
        flops_per_sample(DiT(16, width=width, depth=depth, time_width=4), (16,)) or 0
        for depth in (1, 2)
    )
    attention = 2 * 2 * tokens**2 * width
    assert two - one == 2 * 4 * 6 * width + tokens * 2 * 12 * width**2 + attention


class Own(nn.Module):
    """Counts its calls, draws, and keeps a tensor where no module knows of it."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.layer, self.beside = nn.Conv2d(3, 3, 3, padding=1), torch.ones(3, 1, 1)
        self.fails, self.calls = fails, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.fails:
            raise ValueError("one row is too few")
        out: Tensor = self.layer(x + torch.randn(())) * self.beside
        return out


@pytest.mark.parametrize("fails", [False, True])
def test_counting_changes_nothing_and_what_cannot_be_counted_is_unknown(fails: bool) -> None:
    model = Own(fails)
    before = torch.get_rng_state()
    found = flops_per_sample(model, (3, 8, 8))
    assert found == (None if fails else 2 * 27 * 3 * 64)
    assert (model.calls, model.training) == (0, True)
    assert torch.equal(torch.get_rng_state(), before)
