"""A down-and-up multilayer perceptron for vectors, with skip connections: U-Net without pixels."""

import torch
from torch import Tensor, nn

from flowjobs.models.blocks import FinalNorm, ResidualBlock, TimeEmbedding, zero_linear


class UNet(nn.Module):
    """Predicts the velocity at (x, t); each level of the way down is half as wide.

    The way up gets what the way down had at its level beside its own (Ronneberger et al.,
    https://arxiv.org/abs/1505.04597), at each level with a residual block as the MLP has them.

    Args:
        dim: Width of the data.
        width: Width of the first level; None: 256, or `dim` if that is larger.
        depth: How often the width is halved.
        time_width: Width of the time embedding; even.
        dropout: Share of hidden units left out in training, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        depth: int = 2,
        time_width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = max(256, dim) if width is None else width
        widths = [max(1, width >> level) for level in range(depth + 1)]

        def blocks(widths: list[int]) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(width, time_width, dropout) for width in widths)

        self.time = TimeEmbedding(time_width)
        self.linear_in = nn.Linear(dim, width)
        *wide, narrowest = widths
        self.blocks_down = blocks(wide)
        self.down = nn.ModuleList(map(nn.Linear, wide, widths[1:]))
        self.middle = ResidualBlock(narrowest, time_width, dropout)
        self.up = nn.ModuleList(
            nn.Linear(narrower + wider, wider)
            for wider, narrower in zip(wide, widths[1:], strict=True)
        )
        self.blocks_up = blocks(wide)
        self.norm = FinalNorm(width, time_width)
        self.linear_out = zero_linear(width, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Points of shape (batch, dim) at times (batch,) in [0, 1] to velocities (batch, dim)."""
        time = self.time(t)
        hidden, skips = self.linear_in(x), []
        for block, down in zip(self.blocks_down, self.down, strict=True):
            skips.append(hidden := block(hidden, time))
            hidden = down(hidden)
        hidden = self.middle(hidden, time)
        for block, up in zip(reversed(self.blocks_up), reversed(self.up), strict=True):
            hidden = block(up(torch.cat([hidden, skips.pop()], dim=-1)), time)
        velocity: Tensor = self.linear_out(self.norm(hidden, time))
        return velocity
