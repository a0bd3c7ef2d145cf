"""A transformer over chunks of a vector."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowjobs.models.blocks import Output, TimeEmbedding, modulated, zero_linear


class Attention(nn.Module):
    """Each token looks at all, with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of shape (batch, tokens, width) to the same shape."""
        # (batch, tokens, 3 * width) to three of (batch, heads, tokens, width of a head).
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.linear_out(found.transpose(1, 2).flatten(-2))
        return out


class DiTBlock(nn.Module):
    """Attention, then Linear-GELU-Linear, each modulated and gated by the time."""

    def __init__(self, width: int, heads: int, time_width: int, dropout: float) -> None:
        super().__init__()
        self.modulation = zero_linear(time_width, 6 * width)
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear_in = nn.Linear(width, 4 * width)
        self.linear_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Shapes (batch, tokens, width) and (batch, 1, time_width) to (batch, tokens, width)."""
        shift_a, scale_a, gate_a, shift, scale, gate = self.modulation(time).chunk(6, dim=-1)
        looked_at = self.attention(modulated(self.norm_attention(x), shift_a, scale_a))
        x = torch.addcmul(x, gate_a, looked_at)
        hidden = functional.gelu(self.linear_in(modulated(self.norm(x), shift, scale)))
        return torch.addcmul(x, gate, self.linear_out(self.dropout(hidden)))


class DiT(nn.Module):
    """Predicts the velocity at (x, t) with a transformer over chunks of x.

    Source: Peebles and Xie, DiT (https://arxiv.org/abs/2212.09748), with chunks for patches and
    learned positions. A last chunk that is too short is filled up with zeros.

    Args:
        dim: Width of the data.
        width: Width of a token, a multiple of `heads`; None: 128, or that of a chunk if that is
            larger.
        depth: Blocks.
        chunk: Numbers that make a token; None: the square root of `dim`, so that there are as many
            tokens.
        heads: Heads of the attention.
        time_width: Width of the time embedding; even.
        dropout: Share of hidden units left out in training, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        depth: int = 3,
        chunk: int | None = None,
        heads: int = 4,
        time_width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        chunk = math.isqrt(dim) if chunk is None else chunk
        width = max(128, -(-chunk // heads) * heads) if width is None else width
        if width % heads:
            raise ValueError(f"width: found {width}, expected a multiple of heads ({heads})")
        tokens = -(-dim // chunk)
        self.chunk = chunk
        self.padding = tokens * chunk - dim
        self.time = TimeEmbedding(time_width)
        self.linear_in = nn.Linear(chunk, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, time_width, dropout) for _ in range(depth)
        )
        self.out = Output(width, chunk, time_width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Points of shape (batch, dim) at times (batch,) in [0, 1] to velocities (batch, dim)."""
        time = self.time(t).unsqueeze(1)
        chunks = functional.pad(x, (0, self.padding)).view(len(x), -1, self.chunk)
        hidden = self.linear_in(chunks) + self.positions
        for block in self.blocks:
            hidden = block(hidden, time)
        velocity: Tensor = self.out(hidden, time).flatten(1)
        return velocity[:, : x.shape[1]]
