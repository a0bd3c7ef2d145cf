import itertools

import torch

from flowjobs.flows.path import couple_by_optimal_transport, sample_path


def test_icfm_goes_straight_from_noise_to_data() -> None:
    x_0, x_1, t = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    path = sample_path("icfm", x_0, x_1, t, sigma=0.0, noise=None)
    assert torch.allclose(path.x_t, (1 - t)[:, None] * x_0 + t[:, None] * x_1, atol=1e-6)
    assert torch.equal(path.dx_t, x_1 - x_0)


def test_the_ends_of_a_path_are_the_pair() -> None:
    x_0, x_1 = torch.randn(4, 2), torch.randn(4, 2)
    assert torch.equal(sample_path("icfm", x_0, x_1, torch.zeros(4), 0.0, None).x_t, x_0)
    assert torch.equal(sample_path("icfm", x_0, x_1, torch.ones(4), 0.0, None).x_t, x_1)


def test_sigma_spreads_around_the_path() -> None:
    x_0, x_1, t, noise = torch.zeros(4, 2), torch.ones(4, 2), torch.rand(4), torch.randn(4, 2)
    still = sample_path("icfm", x_0, x_1, t, 0.0, None)
    spread = sample_path("icfm", x_0, x_1, t, 0.5, noise)
    assert torch.allclose(spread.x_t - still.x_t, 0.5 * noise, atol=1e-6)
    assert torch.equal(spread.dx_t, still.dx_t)


def test_otcfm_pairs_at_the_least_cost_of_all_permutations() -> None:
    x_0, x_1 = torch.randn(6, 2), torch.randn(6, 2)
    coupled = couple_by_optimal_transport(x_0, x_1)
    costs = [(x_0[list(order)] - x_1).square().sum() for order in itertools.permutations(range(6))]
    assert torch.isclose((coupled - x_1).square().sum(), min(costs))
    assert torch.equal(coupled.sort(0).values, x_0.sort(0).values)


def test_otcfm_moves_the_noise_and_keeps_the_data() -> None:
    x_0, x_1, t = torch.randn(8, 2), torch.randn(8, 2), torch.ones(8)
    path = sample_path("otcfm", x_0, x_1, t, 0.0, None)
    assert torch.equal(path.x_t, x_1)
    independent = sample_path("icfm", x_0, x_1, t, 0.0, None)
    assert path.dx_t.square().sum() < independent.dx_t.square().sum()
