"""The networks of two papers' two-dimensional tables."""

import torch
from torch import Tensor, nn


class VelocityNet(nn.Module):
    """Three hidden layers of 64 with SELU on (t, x), as the runner of Tong et al. has it.

    https://arxiv.org/abs/2302.00482, table 2.
    """

    def __init__(self, dim: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(dim + 1, width)]
        for _ in range(depth - 1):
            layers += [nn.SELU(), nn.Linear(width, width)]
        self.network = nn.Sequential(*layers, nn.SELU(), nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Shapes (batch, dim) and (batch,) to (batch, dim)."""
        velocity: Tensor = self.network(torch.cat([t[:, None], x], dim=1))
        return velocity


class ResidualNet(nn.Module):
    """Three residual blocks of 128 with GELU, four times as wide inside.

    As the two-dimensional example of Cheng and Schwing, https://arxiv.org/abs/2503.10636.
    """

    def __init__(self, dim: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(dim + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Shapes (batch, dim) and (batch,) to (batch, dim)."""
        hidden = self.first(torch.cat([t[:, None], x], dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        velocity: Tensor = self.last(hidden)
        return velocity
