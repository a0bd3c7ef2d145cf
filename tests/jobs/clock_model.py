"""A model that no seed governs: it looks at the clock."""

import time

from torch import Tensor, nn


class ClockModel(nn.Module):
    """One linear layer, in the time of day.

    Args:
        dim: Width of the data.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        del t
        out: Tensor = self.linear(x) * (1 + time.time() % 1)
        return out
