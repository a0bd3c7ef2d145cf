"""Changes to the training rows of a step, as functions of (seed, step).

They change the distribution that is learned, so that validation and measures are of clean data.
"""

import numpy as np
import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data.randomness import derive_seed, generator_for

DEFAULT_STRENGTH = {"noise": 0.1, "mixup": 0.2, "dropout": 0.1}


def augmented(
    x_1: Tensor, config: TrainingConfig, step: int, rank: int, *, paired: bool = False
) -> Tensor:
    """The rows of a step as `--aug` has them.

    Args:
        x_1: Normalized rows of this rank, shape (batch, *shape).
        config: Gives the augmentation, its strength and the seed.
        step: The step, from 0.
        rank: This process among those that share a batch.
        paired: Whether each row has a partner of its own already, and must stay mostly itself.
    """
    if config.aug == "none":
        return x_1
    strength = config.aug_strength or DEFAULT_STRENGTH[config.aug]
    place = (config.seed, "augmentation", step, rank)
    device, generator = x_1.device, generator_for(x_1.device, *place)
    match config.aug:
        case "noise":
            noise = torch.empty_like(x_1).normal_(generator=generator)
            return x_1 + strength * noise
        case "dropout":
            # An entry that is left out is its column's mean, which is 0 where they are normalized.
            return x_1 * (torch.empty_like(x_1).uniform_(generator=generator) >= strength)
        case "mixup":
            # Zhang et al., eq. 1 (https://arxiv.org/abs/1710.09412), with λ of each row its own.
            # torch draws none of Beta from a generator of one's own.
            drawn = np.random.default_rng(derive_seed(*place)).beta(strength, strength, len(x_1))
            share = torch.from_numpy(drawn).to(x_1).view(-1, *[1] * (x_1.dim() - 1))
            if paired:
                share = torch.maximum(share, 1 - share)
            others = torch.randperm(len(x_1), generator=generator, device=device)
            return x_1[others].lerp(x_1, share)
