"""A residual multilayer perceptron for vectors."""

from torch import Tensor, nn

from flowjobs.models.blocks import FinalNorm, ResidualBlock, TimeEmbedding, zero_linear


class MLP(nn.Module):
    """Predicts the velocity at (x, t) with residual blocks, modulated by the time.

    Source: SimpleMLPAdaLN of Li et al., MAR (https://arxiv.org/abs/2406.11838).

    Args:
        dim: Width of the data.
        width: Width of the hidden layers; None: 256, or `dim` if that is larger.
        depth: Residual blocks.
        time_width: Width of the time embedding; even.
        dropout: Share of hidden units left out in training, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        depth: int = 3,
        time_width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = max(256, dim) if width is None else width
        self.time = TimeEmbedding(time_width)
        self.linear_in = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, time_width, dropout) for _ in range(depth))
        self.norm = FinalNorm(width, time_width)
        self.linear_out = zero_linear(width, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Points of shape (batch, dim) at times (batch,) in [0, 1] to velocities (batch, dim)."""
        time = self.time(t)
        hidden = self.linear_in(x)
        for block in self.blocks:
            hidden = block(hidden, time)
        velocity: Tensor = self.linear_out(self.norm(hidden, time))
        return velocity
