"""Two-dimensional sets of the papers, by the generators of their published tables.

    8gaussians, moons, scurve       with noise as the source, of Tong et al., table 2
                                    (https://arxiv.org/abs/2302.00482; the code of their runner)
    8gaussians-tong, moons-tong     the wider pair of their moons → 8gaussians
    8gaussians-c2ot, moons-c2ot     of C2OT's 8gaussians → moons (https://arxiv.org/abs/2503.10636)

The tables train on the points as they are: --normalize none. Each set has 10,000 training points,
and as many others for validation and measures.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from flowjobs.runs.datasets import TOY_ROWS

# Arrays of whole points, of shape (n, 2).
Points = np.ndarray[tuple[int, int], np.dtype[np.float64]]
_Generator = Callable[[int, np.random.Generator], Points]


def toy_set(name: str) -> Tensor:
    """2 TOY_ROWS points of a set, the same at each call, float32 of shape (2 TOY_ROWS, 2)."""
    points = _SETS[name](2 * TOY_ROWS, np.random.default_rng(0))
    return torch.from_numpy(points).float()


def _eight_gaussians(radius: float, std: float) -> _Generator:
    """Normal around eight points of a circle, each as likely."""

    def generate(n: int, random: np.random.Generator) -> Points:
        angles = random.integers(8, size=n) * (np.pi / 4)
        centres = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return centres + std * random.standard_normal((n, 2))

    return generate


def _moons(noise: float, random: np.random.Generator, n: int) -> Points:
    """scikit-learn's moons, in any order."""
    from sklearn.datasets import make_moons

    points: Points = make_moons(n, noise=noise, random_state=int(random.integers(2**31)))[0]
    return points


def _tongs_moons(n: int, random: np.random.Generator) -> Points:
    points: Points = 2 * _moons(0.05, random, n) - [1, 0]
    return points


def _tongs_wide_moons(n: int, random: np.random.Generator) -> Points:
    points = _moons(0.1, random, n)
    # One mean and one deviation of all numbers, not of each column.
    wide: Points = 7 * (points - points.mean()) / points.std(ddof=1)
    return wide


def _tongs_scurve(n: int, random: np.random.Generator) -> Points:
    from sklearn.datasets import make_s_curve

    points = make_s_curve(n, noise=0.05, random_state=int(random.integers(2**31)))[0]
    flat: Points = 1.5 * points[:, [0, 2]]
    return flat


def _torchdyns_moons(n: int, random: np.random.Generator) -> Points:
    """Evenly along the arcs; both coordinates are moved by the same part of 0.2."""
    along = np.linspace(0, np.pi, n // 2), np.linspace(0, np.pi, n - n // 2)
    outer = np.stack([np.cos(along[0]), np.sin(along[0])], axis=1)
    inner = np.stack([1 - np.cos(along[1]), 0.5 - np.sin(along[1])], axis=1)
    points = np.concatenate([outer, inner]) + 0.2 * random.random((n, 1))
    return random.permutation(3 * points - 1)


_SETS: Mapping[str, _Generator] = {
    "8gaussians": _eight_gaussians(radius=5, std=1),
    "moons": _tongs_moons,
    "scurve": _tongs_scurve,
    "8gaussians-tong": _eight_gaussians(radius=12, std=1.5),
    "moons-tong": _tongs_wide_moons,
    # The root of a variance of 0.1 is passed as the covariance.
    "8gaussians-c2ot": _eight_gaussians(radius=5, std=0.1**0.25),
    "moons-c2ot": _torchdyns_moons,
}
