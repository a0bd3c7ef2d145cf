"""How far samples are from data: each measure a pure function of two clouds of points.

All are of float64 tensors of shape (n, dim) on one device, in the data's own units, and take the
samples first and the reference (data that the model has not seen) second. What is estimated from
n points is not zero between two draws of one distribution: compare with the floor that
`evaluation.evaluate` puts beside each.

Those that every run computes at its end use torch alone: POT takes 1.4 s of CPU to load and
scikit-learn 0.9, more than all of them together. The tests hold them against POT and SciPy.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flowjobs.flows.coupling import SIMPLEX_STEPS

# For random directions.
N_PROJECTIONS = 1000
# Points up to which SciPy solves the transport, and POT beyond.
ASSIGN_AT_MOST = 1000
# Rows of the reference that the median distance is taken over.
BANDWIDTH_ROWS = 2000
# Neighbours whose farthest makes a point's ball (Naeem et al.).
K_NEAREST = 5
# Rows are the same if they are nearer than this part of the reference's size; rounding has 1e-8.
SAME = 1e-6
# Distances that are held at once, of which several copies are made: 128 MB each.
AT_ONCE = 2**24
# For the directions and the classifier.
SEED = 0
FOLDS = 5
TREES = 100
# In units of the reference; float32 ends at 3e38.
LARGEST = 1e30


def sliced_wasserstein(samples: Tensor, reference: Tensor) -> float:
    """The sliced 2-Wasserstein distance over N_PROJECTIONS fixed directions.

    The root of the mean over directions of the squared 2-Wasserstein distance of the projections
    (Bonneel et al., https://doi.org/10.1007/s10851-014-0506-3), as `ot.sliced_wasserstein_distance`
    has it. For equally many samples and points.
    """
    generator = torch.Generator().manual_seed(SEED)
    size = (N_PROJECTIONS, samples.shape[1])
    directions = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    directions = functional.normalize(directions.to(samples))
    # NumPy's sort is five times as fast on a CPU as torch's, which sorts indices too.
    first, second = (
        np.sort((directions @ points.T).cpu().numpy(), axis=1) for points in (samples, reference)
    )
    return math.sqrt(np.square(first - second).mean())


def wasserstein2(samples: Tensor, reference: Tensor) -> float:
    """The exact 2-Wasserstein distance of equally many samples and points."""
    return math.sqrt(squared_wasserstein2(samples, reference))


def squared_wasserstein2(samples: Tensor, reference: Tensor) -> float:
    """The square of `wasserstein2`: the least mean squared distance of pairs.

    With equal weights the best plan is a permutation, which SciPy finds; POT's network simplex
    takes a third of its time (5 s for 5,000 points), and pays for its loading where there are many.
    """
    parts = (part.square_().cpu() for part in _distances_by_rows(samples, reference))
    cost = torch.cat([*parts]).numpy()
    if len(cost) > ASSIGN_AT_MOST:
        import ot

        unit = cost.max() or 1.0  # to the solver, all below 1e-15 are the same
        return float(unit * ot.emd2([], [], cost / unit, numItermax=SIMPLEX_STEPS))
    from scipy.optimize import linear_sum_assignment

    return float(cost[linear_sum_assignment(cost)].mean())


def mmd(samples: Tensor, reference: Tensor) -> float:
    """The squared maximum mean discrepancy with a Gaussian kernel, unbiased: it can be negative.

    The bandwidth is the median distance within the reference, so that all models are measured by
    one kernel (Gretton et al., https://jmlr.org/papers/v13/gretton12a.html, eq. 3); the mean
    distance where most rows are the same, and the median is 0.
    """
    apart = torch.pdist(reference[:BANDWIDTH_ROWS])
    scale = 2 * (float(apart.median()) or float(apart.mean()) or 1.0) ** 2

    def kernels(first: Tensor, second: Tensor) -> float:
        """The sum over all pairs."""
        parts = _distances_by_rows(first, second)
        return sum(float((-part.square() / scale).exp().sum()) for part in parts)

    n, m = len(samples), len(reference)
    # Without a point's kernel with itself, which is 1.
    among_samples = (kernels(samples, samples) - n) / (n * (n - 1))
    among_reference = (kernels(reference, reference) - m) / (m * (m - 1))
    return among_samples + among_reference - 2 * kernels(samples, reference) / (n * m)


def energy_distance(samples: Tensor, reference: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased: it can be negative.

    The squared distance of Székely and Rizzo (https://doi.org/10.1016/j.jspi.2013.03.018).
    """

    def distances(first: Tensor, second: Tensor) -> float:
        """The sum over all pairs."""
        return sum(float(part.sum()) for part in _distances_by_rows(first, second))

    n, m = len(samples), len(reference)
    among_samples = distances(samples, samples) / (n * (n - 1))
    among_reference = distances(reference, reference) / (m * (m - 1))
    return 2 * distances(samples, reference) / (n * m) - among_samples - among_reference


def frechet(samples: Tensor, reference: Tensor) -> float:
    """The squared 2-Wasserstein distance of the two Gaussians of these means and covariances.

    In the data's own space (FID has it in a network's). It needs n well above the dimension.
    """
    means = samples.mean(0), reference.mean(0)
    apart = (means[0] - means[1]).square().sum()
    n, m, dim = len(samples), len(reference), samples.shape[1]
    if dim > min(n, m):
        # With A = XᵀX / (n - 1) of the centred points, and B of Y, tr (A B)^½ is the sum of the
        # singular values of XYᵀ: for a picture of 64 x 64, A alone would take 1.2 GB.
        x, y = samples - means[0], reference - means[1]
        traces = x.square().sum() / (n - 1) + y.square().sum() / (m - 1)
        cross = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt((n - 1) * (m - 1))
        return float(apart + traces - 2 * cross)
    first, second = (points.T.cov().view(dim, dim) for points in (samples, reference))
    # tr (A B)^½ = tr (A^½ B A^½)^½: of a symmetric matrix, whose eigenvalues are real.
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float(apart + first.trace() + second.trace() - 2 * cross)


def prdc(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al.), density and coverage (Naeem et al.), k = 5.

    https://arxiv.org/abs/1904.06991, https://arxiv.org/abs/2002.09797. A point's ball reaches to
    its k-th nearest neighbour among its own; that of a row with k copies, to the rows that are the
    same.
    """
    centred = reference - reference.mean(0)
    same = SAME * float(centred.square().sum(1).mean().sqrt())
    reference_ball, sample_ball = (
        _kth_neighbour(points).clamp_min(same) for points in (reference, samples)
    )
    # For each sample, how many of the reference's balls it is in; for each reference point, whether
    # it is in a sample's ball, and whether a sample is in its own.
    balls = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    recalled, covered, start = 0, 0, 0
    for between in _distances_by_rows(reference, samples):
        own_ball = reference_ball[start : start + len(between)]
        start += len(between)
        balls += (between < own_ball.unsqueeze(1)).sum(0)
        recalled += int((between < sample_ball).any(1).sum())
        covered += int((between.amin(1) < own_ball).sum())
    n, m = len(samples), len(reference)
    return {
        "precision": float((balls > 0).sum()) / n,
        "recall": recalled / m,
        "density": float(balls.sum()) / (n * K_NEAREST),
        "coverage": covered / m,
    }


def nearest_distances(points: Tensor, others: Tensor) -> Tensor:
    """The distance of each point to the nearest of others, shape (n,)."""
    return torch.cat([part.amin(1) for part in _distances_by_rows(points, others)])


def c2st(samples: Tensor, reference: Tensor) -> float:
    """How often a classifier tells samples from data: 0.5 is chance, 1 is always.

    The accuracy over 5 folds of scikit-learn's extremely randomized trees (Lopez-Paz and Oquab,
    https://arxiv.org/abs/1610.06545). Other classifiers give other figures.
    """
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    # The trees take float32, where columns far from 0 lose digits and large numbers are infinite.
    mean, std = reference.mean(0), reference.std(0)
    units = (torch.cat([samples, reference]) - mean) / torch.where(std > 0, std, 1.0)
    points = units.clamp(-LARGEST, LARGEST).float().cpu().numpy()
    labels = np.repeat([0, 1], [len(samples), len(reference)])
    classifier = ExtraTreesClassifier(n_estimators=TREES, random_state=SEED)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    return float(cross_val_score(classifier, points, labels, cv=folds).mean())


def _distances_by_rows(first: Tensor, second: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of some points of `first` at a time to all of `second`, in order."""
    # By matrix products where both are large. Near points far from the origin would lose digits.
    centre = second.mean(0)
    others, start = second - centre, 0
    for points in torch.split(first - centre, max(1, AT_ONCE // len(second))):
        found: Tensor = torch.cdist(points, others)
        if first is second:
            found.diagonal(start).zero_()
        start += len(points)
        yield found


def _kth_neighbour(points: Tensor) -> Tensor:
    """The distance of each point to its k-th nearest neighbour, shape (n,)."""
    k = min(K_NEAREST, len(points) - 1)
    parts = _distances_by_rows(points, points)
    return torch.cat([part.kthvalue(k + 1, dim=1).values for part in parts])
