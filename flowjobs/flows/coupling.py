"""How the rows of a batch are paired: plans of optimal transport between source and data.

Both take x_0 and x_1 of shape (batch, dim), and give for each row of x_1 its row of x_0, so that
every row of the data is used once. With a squared distance, |x_1 - x_0|² = |x_1|² + |x_0|² -
2 x_1·x_0: of the sum over any plan with these marginals only the last term depends on the plan, and
without the others no digits cancel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# The entropic plan is done at this deviation of a row's weight, or after so many iterations.
# Where ε is far below the costs, 500 iterations come within 3 % of the plan (total variation).
SINKHORN_TOLERANCE = 1e-3
SINKHORN_STEPS = 500
# POT absorbs scalings above this into the potentials. They are about n from the first step on: with
# its default of 1000, of 1,000 points each step would be lost.
ABSORB_ABOVE = 1e9
# Where POT's exact solver is faster than SciPy's.
POT_UP_TO_DIM = 4
POT_FROM_ROWS = 256
# More than POT's exact solver ever takes.
SIMPLEX_STEPS = 100_000_000


def exact(x_0: Tensor, x_1: Tensor, sigma: float, seed: int) -> Tensor:
    """The exact plan of least squared distance, which is a permutation. Knows no chance.

    SciPy is fastest with the rows of x_0 in order, and POT where the dimension is small: of 512
    rows SciPy takes 40 ms in 2 dimensions and 12 in 64, POT 22 and 23.
    """
    import numpy as np

    cost = _cost(x_0, x_1)
    if x_0.shape[1] <= POT_UP_TO_DIM and len(cost) >= POT_FROM_ROWS:
        import ot  # not at the start of runs without it

        plan = ot.emd([], [], cost / _unit(cost), numItermax=SIMPLEX_STEPS)
        return _indices(plan.argmax(axis=1), x_0)
    from scipy.optimize import linear_sum_assignment

    _, partners = linear_sum_assignment(np.ascontiguousarray(cost.T))
    return _indices(np.argsort(partners), x_0)


def entropic(x_0: Tensor, x_1: Tensor, sigma: float, seed: int) -> Tensor:
    """A draw from the entropic plan with ε = 2σ²: for each row of x_1, one of x_0.

    The Schrödinger bridge of a Brownian motion of variance σ² (Tong et al., proposition 3.4). The
    partner of each row is drawn alone, so that a row of x_0 may be taken twice or not at all, as
    the plan has it; with a small σ it is nearly the exact permutation.

    Sinkhorn's iterations start from the exact plan's potentials. From zero they need some
    cost / ε rounds, which is thousands where σ is small, and a plan that is left before takes the
    same rows of x_0 again and again.
    """
    import numpy as np
    import ot

    cost = _cost(x_0, x_1)
    if 2 * sigma**2 < np.finfo(np.float64).eps * cost.max():
        # Below the rounding of the costs: a plan of such an ε would be of NaN.
        return exact(x_0, x_1, sigma, seed)
    n = len(cost)
    weights = np.full(n, 1 / n)
    unit = _unit(cost)
    _, log = ot.emd(weights, weights, cost / unit, numItermax=SIMPLEX_STEPS, log=True)
    plan = ot.bregman.sinkhorn_stabilized(
        weights,
        weights,
        cost,
        2 * sigma**2,
        tau=ABSORB_ABOVE,
        numItermax=SINKHORN_STEPS,
        stopThr=SINKHORN_TOLERANCE / math.sqrt(n),
        warmstart=(unit * log["u"], unit * log["v"]),
        warn=False,
    )
    shares = np.cumsum(plan, axis=1)
    drawn = np.random.default_rng(seed).random((n, 1)) * shares[:, -1:]
    partners = (shares <= drawn).sum(axis=1).clip(max=n - 1)
    return _indices(partners, x_0)


def _unit(cost: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
    """What small costs are measured in: to POT's exact solver, all below 1e-15 are the same."""
    most = float(cost.max())
    # A power of two, which changes no digit.
    return 2.0 ** math.frexp(most)[1] if 0 < most < 1 else 1.0


def _cost(x_0: Tensor, x_1: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The part of the squared distances that a plan decides, at least 0; rows are of x_1."""
    cost = -2 * (x_1.double() @ x_0.double().T)
    found: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (cost - cost.min()).cpu().numpy()
    return found


def _indices(partners: np.ndarray[tuple[int], np.dtype[np.int64]], x_0: Tensor) -> Tensor:
    import torch

    return torch.as_tensor(partners, dtype=torch.int64, device=x_0.device)
