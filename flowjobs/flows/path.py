"""Conditional flow matching: paths from noise to data and the velocity along them.

Source: Tong et al., Improving and generalizing flow-based generative models with minibatch
optimal transport (https://arxiv.org/abs/2302.00482); names as in torchcfm and flow_matching.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowjobs.config import Flow


@dataclass(frozen=True)
class PathSample:
    """Points on the paths of a batch.

    Attributes:
        x_t: The points, shape (batch, dim).
        t: Their times in [0, 1], shape (batch,).
        dx_t: The velocity of each path there, shape (batch, dim): what a model should predict.
    """

    x_t: Tensor
    t: Tensor
    dx_t: Tensor


def sample_path(
    flow: Flow, x_0: Tensor, x_1: Tensor, t: Tensor, sigma: float, noise: Tensor | None
) -> PathSample:
    """Couple a batch of noise with a batch of data and take a point on each path (eq. 14, 15).

    Args:
        flow: "icfm" takes the pairs as they come; "otcfm" first reorders x_0 by the exact optimal
            transport plan of the minibatch.
        x_0: Source samples, shape (batch, dim).
        x_1: Data, shape (batch, dim).
        t: Times in [0, 1], shape (batch,).
        sigma: Standard deviation around the path.
        noise: Standard normal, shape (batch, dim); None where sigma is 0.
    """
    match flow:
        case "icfm":
            pass
        case "otcfm":
            x_0 = couple_by_optimal_transport(x_0, x_1)
    x_t = torch.lerp(x_0, x_1, t.unsqueeze(-1))
    if noise is not None:
        x_t = x_t + sigma * noise
    return PathSample(x_t=x_t, t=t, dx_t=x_1 - x_0)


def couple_by_optimal_transport(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Reorder x_0 so that the sum of squared distances to x_1, row by row, is least.

    With equally many points of equal weight the exact plan is a permutation, so SciPy's linear
    assignment solves it (on the CPU).

    Args:
        x_0: Shape (batch, dim).
        x_1: Shape (batch, dim).

    Returns:
        The rows of x_0 in the order of their partners in x_1.
    """
    from scipy.optimize import linear_sum_assignment  # not at the start of runs without it

    cost = torch.cdist(x_1.float(), x_0.float()).square()
    _, partner = linear_sum_assignment(cost.cpu().numpy())
    return x_0[torch.as_tensor(partner, device=x_0.device)]
