"""Vectors as wide as embeddings that nothing is to be downloaded for: written to a file.

    python -m tests.data.stand_ins mixture mixture.npy

`mixture` has parts of few directions each, `pushed` is noise of few dimensions through a random
network.
"""

import sys

import numpy as np
import torch
from torch import Tensor


def mixture(dim: int, n: int = 2000, parts: int = 10, directions: int = 16) -> Tensor:
    """Gaussians of low rank, and a little of all other directions; (n, dim)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    part = torch.randint(parts, (n,), generator=generator)
    means, factors = normal(parts, dim), normal(parts, directions, dim) / directions**0.5
    along = torch.einsum("nd,ndw->nw", normal(n, directions), factors[part])
    return means[part] + along + 0.05 * normal(n, dim)


def pushed(dim: int, n: int = 2000, inner: int = 32) -> Tensor:
    """Noise of few dimensions through a random network; (n, dim)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, inner, generator=generator)
    for width in (256, dim):
        weights = torch.randn(x.shape[1], width, generator=generator) / x.shape[1] ** 0.5
        x = torch.tanh(2 * x @ weights)
    return x + 0.05 * torch.randn(n, dim, generator=generator)


if __name__ == "__main__":
    name, file = sys.argv[1:]
    np.save(file, {"mixture": mixture, "pushed": pushed}[name](1024, n=10_000).numpy())
