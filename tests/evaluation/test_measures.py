"""Each measure against a closed form or an independent implementation."""

import math

import numpy as np
import ot
import pytest
import torch
from scipy import linalg, stats
from torch import Tensor

from flowjobs.evaluation import measures


def cloud(n: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, dim), generator=generator, dtype=torch.float64) + shift


def test_sliced_wasserstein_is_that_of_pot_and_of_a_shift() -> None:
    x, y = cloud(300, 5, 1), 1.3 * cloud(300, 5, 2, 0.4)
    theirs = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), n_projections=5_000, seed=0)
    assert measures.sliced_wasserstein(x, y) == pytest.approx(theirs, rel=0.02)
    # Of a shift s: the root of the mean of (s · direction)², which is |s| / √dim.
    assert measures.sliced_wasserstein(x, x + 3) == pytest.approx(3, rel=0.05)
    assert measures.sliced_wasserstein(x, x[torch.randperm(300)]) == 0


def test_wasserstein2_is_that_of_pot_and_in_one_dimension_that_of_sorting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = cloud(200, 3, 1), cloud(200, 3, 2, 0.5)
    theirs = ot.emd2([], [], ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean"))
    for at_most in (1000, 100):
        monkeypatch.setattr(measures, "ASSIGN_AT_MOST", at_most)
        for scale in (1.0, 1e-9, 1e9):
            found = measures.wasserstein2(scale * x, scale * y)
            assert found == pytest.approx(scale * math.sqrt(theirs))
    x, y = x[:, :1], y[:, :1]
    by_sorting = (x.sort(0).values - y.sort(0).values).square().mean().sqrt()
    assert measures.wasserstein2(x, y) == pytest.approx(float(by_sorting))


def test_energy_distance_is_that_of_scipy_without_its_bias() -> None:
    n, m = 400, 300
    x, y = cloud(n, 1, 1), 2 * cloud(m, 1, 2, 0.3)
    biased = stats.energy_distance(x.flatten(), y.flatten()) ** 2
    # SciPy's means within a cloud count each point with itself.
    bias = sum(float((p - p.T).abs().mean()) / (len(p) - 1) for p in (x, y))
    assert measures.energy_distance(x, y) == pytest.approx(biased - bias)


def test_mmd_of_two_gaussians_is_the_closed_form() -> None:
    n, shift = 2000, 0.7
    x, y = (points - points.mean(0) for points in (cloud(n, 2, 1), cloud(n, 2, 2)))
    x += shift
    # The median distance of two standard normal points in 2-D is that of a Rayleigh variable.
    width2 = 2 * 2 * math.log(2)
    scale = 1 + 2 / width2
    closed = 2 / scale * (1 - math.exp(-2 * shift**2 / (2 * width2 * scale)))
    assert measures.mmd(x, y) == pytest.approx(closed, rel=0.05)


def test_mmd_of_data_that_are_mostly_one_point_is_a_number() -> None:
    data = torch.zeros(100, 3, dtype=torch.float64)
    assert math.isfinite(measures.mmd(cloud(100, 3, 1), data))
    data[:20] = cloud(20, 3, 2)
    assert measures.mmd(cloud(100, 3, 1), data) > measures.mmd(data.flip(0), data)


def test_distances_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = cloud(70, 3, 1), cloud(60, 3, 2, 0.3)

    def measured() -> list[float]:
        nearest = float(measures.nearest_distances(x, y).sum())
        exact = measures.wasserstein2(x[:60], y)
        of_both = (measures.mmd(x, y), measures.energy_distance(x, y))
        return [nearest, exact, *of_both, *measures.prdc(x, y).values()]

    at_once = measured()
    monkeypatch.setattr(measures, "AT_ONCE", 7 * 70)
    assert measured() == pytest.approx(at_once, rel=1e-6)


@pytest.mark.parametrize("measure", [measures.mmd, measures.energy_distance])
def test_unbiased_measures_are_zero_on_the_mean_for_the_same_distribution(measure: object) -> None:
    assert callable(measure)
    found = [measure(cloud(60, 4, 2 * seed), cloud(60, 4, 2 * seed + 1)) for seed in range(40)]
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(len(found))
    assert min(found) < 0 < max(found)


@pytest.mark.parametrize("dim", [1, 3])
def test_frechet_of_two_gaussians_is_that_of_scipys_root(dim: int) -> None:
    x, y = cloud(500, dim, 1), cloud(400, dim, 2, 1) @ (torch.eye(dim).double() + 0.5)
    first, second = (np.cov(p.numpy().T).reshape(dim, dim) for p in (x, y))
    apart = np.square(x.mean(0).numpy() - y.mean(0).numpy()).sum()
    closed = apart + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert measures.frechet(x, y) == pytest.approx(closed)
    assert measures.frechet(x, 3 * x) == pytest.approx(
        float(4 * x.mean(0).square().sum() + 4 * x.T.cov().reshape(dim, dim).trace())
    )


@pytest.mark.parametrize(("n", "m"), [(10, 10), (10, 25), (25, 60), (60, 25)])
def test_frechet_of_fewer_points_than_dimensions_is_that_of_the_covariances(n: int, m: int) -> None:
    x, y = cloud(n, 30, 1), 2 * cloud(m, 30, 2, 1)
    first, second = x.T.cov(), y.T.cov()
    # The square roots of eigenvalues that are 0 but for rounding.
    cross = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    closed = float(apart + first.trace() + second.trace() - 2 * cross)
    assert measures.frechet(x, y) == pytest.approx(closed, abs=1e-5)


def test_frechet_of_pictures_takes_no_covariance() -> None:
    dim = 200_000  # whose covariance would take 320 GB
    x = cloud(20, dim, 1)
    assert measures.frechet(x, x + 1) == pytest.approx(dim)


def test_precision_recall_density_and_coverage() -> None:
    # Two modes of the data, far apart; samples of one of them alone.
    data = torch.cat([cloud(300, 2, 1), cloud(300, 2, 2, 100.0)])
    found = measures.prdc(cloud(600, 2, 3), data)
    assert found["precision"] > 0.9
    assert found["recall"] == pytest.approx(0.5, abs=0.06)
    assert found["coverage"] == pytest.approx(0.5, abs=0.06)
    assert found["density"] == pytest.approx(0.5 * 2, abs=0.15)
    far = measures.prdc(cloud(600, 2, 3, 50.0), data)
    assert (far["precision"], far["recall"], far["density"], far["coverage"]) == (0, 0, 0, 0)
    assert measures.prdc(data, data)["coverage"] == 1


@pytest.mark.parametrize("dim", [2, 500])
def test_rows_that_are_often_in_the_data_are_found_by_their_copies(dim: int) -> None:
    grid = torch.randint(0, 5, (500, 2), generator=torch.manual_seed(0)).double()
    grid = grid.repeat(1, dim // 2) + 1e3
    oversampled = cloud(50, dim, 1).repeat(6, 1)
    for samples, data in ((grid, grid), (grid[:250], grid[250:]), (oversampled, oversampled)):
        found = measures.prdc(samples, data)
        assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
        assert found["density"] >= 1
    beside = measures.prdc(grid + 1e-3, grid)
    assert (beside["precision"], beside["coverage"]) == (0, 0)


def test_a_classifier_tells_what_differs_alone() -> None:
    x = cloud(200, 2, 1)
    same = measures.c2st(x, cloud(200, 2, 2))
    assert same == pytest.approx(0.5, abs=0.1)
    assert same == measures.c2st(x, cloud(200, 2, 2))
    assert measures.c2st(x, cloud(200, 2, 2, 3.0)) > 0.95
    # Also where float32 has no digits for the difference, or no such number.
    x, y = x + 1e12, cloud(200, 2, 2, 3.0) + 1e12
    x[0] = 1e39
    assert measures.c2st(x, y) > 0.95
