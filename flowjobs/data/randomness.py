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
    _seed_torch(device, derive_seed(seed, "step", step, rank))


def _seed_torch(device: torch.device, value: int) -> None:
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
    return torch.randperm(n, generator=generator, device="cpu")


@contextmanager
def random_numbers_kept(device: torch.device | None = None) -> Iterator[None]:
    """Leave the default generators as they are, whatever the block draws from them or seeds.

    Args:
        device: What the block draws on; by default also every GPU, once the process uses one: a
            model is built with all of them seeded.
    """
    python, numpy_state = random.getstate(), np.random.get_state()
    gpus: list[torch.device | int] = []
    if device is not None:
        gpus += [device] if device.type == "cuda" else []
    elif torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gpus += range(torch.cuda.device_count())
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Seed the default generators for a block by `parts`, and leave them as they were."""
    with random_numbers_kept(device):
        _seed_torch(device, derive_seed(*parts))
        seed_python_and_numpy(*parts)
        yield
