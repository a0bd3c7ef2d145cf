"""What the built-in models are made of: the time's embedding, and layers that it modulates.

Adaptive layer norm, as in Peebles and Xie, DiT (https://arxiv.org/abs/2212.09748), section 3.2: a
norm without weights of its own, whose shift and scale, and the gate of what follows, come from the
time. What gives them starts at zero ("adaLN-zero"): a new block passes its input on as it is.
"""

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
        if width < 2 or width % 2:
            raise ValueError(f"time_width: found {width}, expected an even number")
        frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        # It ends with the activation that every layer which is modulated would begin with.
        self.network = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, t: Tensor) -> Tensor:
        """Times of shape (batch,) to embeddings of shape (batch, width)."""
        angles = t.unsqueeze(-1) * self.get_buffer("frequencies")
        embedded: Tensor = self.network(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return embedded


class ResidualBlock(nn.Module):
    """x + gate * f(modulated norm of x), with f Linear-SiLU-Linear."""

    def __init__(self, width: int, time_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_linear(time_width, 3 * width)
        self.linear_in = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Shapes (batch, width) and (batch, time_width) to (batch, width)."""
        shift, scale, gate = self.modulation(time).chunk(3, dim=-1)
        hidden = functional.silu(self.linear_in(modulated(self.norm(x), shift, scale)))
        return torch.addcmul(x, gate, self.linear_out(self.dropout(hidden)))


class FinalNorm(nn.Module):
    """The modulated norm before the last layer, which itself is to start at zero."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_linear(time_width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Shapes (batch, …, width) and (batch, …, time_width) to (batch, …, width)."""
        shift, scale = self.modulation(time).chunk(2, dim=-1)
        return modulated(self.norm(x), shift, scale)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) x + shift, for shapes that broadcast."""
    return torch.addcmul(x + shift, x, scale)


def zero_linear(n_in: int, n_out: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    linear = nn.Linear(n_in, n_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
