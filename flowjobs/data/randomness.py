"""Every random number of a run as a function of where it is used, never of what came before.

The order of an epoch follows from (seed, epoch), the noise, times and dropout of a step from
(seed, step, rank). So nothing has to be saved to resume exactly, and a step can be replayed alone.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts` and their order."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def generator_for(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator of its own on `device`, seeded by `parts`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def seed_step(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Seed the default generators, which dropout and a user's own model draw from, for one step.

    Seeds the CPU's and `device`'s generator alone: `torch.manual_seed` also walks every other
    backend, which takes a hundred times longer (96 us against 1 us on the CPU).
    """
    value = derive_seed(seed, "step", step, rank)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.default_generators[index].manual_seed(value)


def seed_python_and_numpy(*parts: int | str) -> None:
    """Seed the default generators of `random` and numpy, which a user's own model may draw from."""
    value = derive_seed(*parts)
    random.seed(value)
    np.random.seed(value % 2**32)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the n rows: a permutation, int64 of shape (n,)."""
    generator = generator_for(torch.device("cpu"), seed, "order", epoch)
    return torch.randperm(n, generator=generator)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Leave the default generators as they are, whatever the block draws from them or seeds."""
    python, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
    )
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
