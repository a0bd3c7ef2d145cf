"""A residual multilayer perceptron for vectors."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time at `width // 2` frequencies, then a small network.

    The frequencies are spaced geometrically from 1 to 1000, as in Vaswani et al.
    (https://arxiv.org/abs/1706.03762) for positions, scaled to times in [0, 1].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.network = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Times of shape (batch,) to embeddings of shape (batch, width)."""
        angles = t.unsqueeze(-1) * self.get_buffer("frequencies")
        embedded: Tensor = self.network(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return embedded


class ResidualBlock(nn.Module):
    """x + f(norm(x), time), with f two linear layers around the time's contribution."""

    def __init__(self, width: int, time_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_in = nn.Linear(width, width)
        self.linear_time = nn.Linear(time_width, width)
        self.linear_out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Shapes (batch, width) and (batch, time_width) to (batch, width)."""
        hidden = self.linear_in(functional.silu(self.norm(x))) + self.linear_time(time)
        out: Tensor = x + self.linear_out(self.dropout(functional.silu(hidden)))
        return out


class MLP(nn.Module):
    """Predicts the velocity at (x, t) with residual blocks.

    The last layer starts at zero, so an untrained model predicts the zero velocity.

    Args:
        dim: Width of the data.
        width: Width of the hidden layers.
        depth: Residual blocks.
        time_width: Width of the time embedding; even.
        dropout: Share of hidden units left out in training, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        width: int = 256,
        depth: int = 3,
        time_width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.time = TimeEmbedding(time_width)
        self.linear_in = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, time_width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.linear_out = nn.Linear(width, dim)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Points of shape (batch, dim) at times (batch,) in [0, 1] to velocities (batch, dim)."""
        time = self.time(t)
        hidden = self.linear_in(x)
        for block in self.blocks:
            hidden = block(hidden, time)
        velocity: Tensor = self.linear_out(functional.silu(self.norm(hidden)))
        return velocity
