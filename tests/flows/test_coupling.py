"""Plans against other solvers: cost, marginals, and that no chance but the seed's is in them."""

import itertools

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from flowjobs.flows.coupling import entropic, exact


def clouds(n: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_0, x_1 = torch.randn((2, n, dim), generator=generator)
    return x_0, 1.5 * x_1 + 100  # far from the origin, where squared distances lose digits


def cost_of(x_0: Tensor, x_1: Tensor) -> float:
    return float((x_0.double() - x_1.double()).square().sum(1).mean())


def test_the_exact_plan_costs_the_least_of_all_permutations() -> None:
    x_0, x_1 = clouds(6, 3)
    least = min(cost_of(x_0[list(order)], x_1) for order in itertools.permutations(range(6)))
    assert cost_of(x_0[exact(x_0, x_1, 0.0, 0)], x_1) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize(("n", "dim"), [(64, 2), (300, 2), (256, 64)])
def test_the_exact_plan_is_a_permutation_of_the_cost_that_pot_finds(n: int, dim: int) -> None:
    x_0, x_1 = clouds(n, dim)
    plan = exact(x_0, x_1, 0.0, 0)
    assert sorted(plan.tolist()) == list(range(n))
    for scale in (2.0**-30, 2.0**30):
        assert torch.equal(exact(scale * x_0, scale * x_1, 0.0, 0), plan)
    costs = torch.cdist(x_1.double(), x_0.double()).square().numpy()
    assert cost_of(x_0[plan], x_1) == pytest.approx(float(ot.emd2([], [], costs)), rel=1e-9)


# POT's default would lose every step of the one of more than 1,000 points.
@pytest.mark.parametrize(
    ("n", "dim", "sigma"), [(64, 2, 0.5), (32, 2, 0.1), (64, 64, 1.0), (1100, 2, 0.7)]
)
def test_the_entropic_plan_is_sinkhorns(
    n: int, dim: int, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_0, x_1 = clouds(n, dim)
    plans = []
    solve = ot.bregman.sinkhorn_stabilized
    monkeypatch.setattr(
        ot.bregman,
        "sinkhorn_stabilized",
        lambda *given, **options: plans.append(solve(*given, **options)) or plans[-1],
    )
    entropic(x_0, x_1, sigma, 0)
    # In logarithms and from zero, which is slow and needs no trust in a start.
    costs = torch.cdist(x_1.double(), x_0.double()).square().numpy()
    weights = np.full(n, 1 / n)
    expected = ot.sinkhorn(
        weights,
        weights,
        costs - costs.min(),
        2 * sigma**2,
        method="sinkhorn_log",
        numItermax=20 if n > 1000 else 3000,
        stopThr=1e-7,
        warn=False,
    )
    assert np.abs(plans[0] - expected).sum() / 2 < 0.03
    assert np.abs(plans[0].sum(0) * n - 1).max() < 0.05
    assert np.abs(plans[0].sum(1) * n - 1).max() < 1e-9


def test_draws_are_from_the_entropic_plan() -> None:
    x_0, x_1 = clouds(8, 2)
    drawn = torch.stack([entropic(x_0, x_1, 1.0, seed) for seed in range(1000)])
    shares = torch.stack([(drawn == column).double().mean(0) for column in range(8)], dim=1)
    costs = torch.cdist(x_1.double(), x_0.double()).square().numpy()
    weights = np.full(8, 1 / 8)
    expected = 8 * ot.sinkhorn(weights, weights, costs, 2.0, method="sinkhorn_log")
    assert np.abs(shares.numpy() - expected).max() < 0.08


def test_a_small_sigma_pairs_as_the_exact_plan_does_and_a_large_one_by_chance() -> None:
    x_0, x_1 = clouds(64, 64)
    plan = exact(x_0, x_1, 0.0, 0)
    assert float((entropic(x_0, x_1, 0.01, 0) == plan).double().mean()) > 0.9
    assert float((entropic(x_0, x_1, 100.0, 0) == plan).double().mean()) < 0.2


@pytest.mark.parametrize(("sigma", "scale"), [(1e-8, 1), (1e-200, 1), (1e-2, 1e6)])
def test_an_entropy_below_what_floats_resolve_leaves_the_exact_plan(
    sigma: float, scale: float
) -> None:
    x_0, x_1 = (scale * part for part in clouds(256, 64))
    assert torch.equal(entropic(x_0, x_1, sigma, 0), exact(x_0, x_1, 0, 0))


def test_a_plan_does_not_depend_on_the_unit() -> None:
    x_0, x_1 = clouds(64, 2)
    plans = [entropic(scale * x_0, scale * x_1, scale * 0.05, 0) for scale in (1.0, 2.0**-40)]
    assert torch.equal(*plans)


def test_a_draw_follows_from_its_seed_alone() -> None:
    x_0, x_1 = clouds(64, 2)
    np.random.seed(1)
    torch.manual_seed(1)
    first = entropic(x_0, x_1, 0.5, seed=3)
    np.random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(entropic(x_0, x_1, 0.5, seed=3), first)
    assert not torch.equal(entropic(x_0, x_1, 0.5, seed=4), first)
