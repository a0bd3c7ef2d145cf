"""The learning rate: a linear warm-up, then a cosine to zero."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int
) -> LambdaLR:
    """The optimizer's learning rate times (s + 1) / warm-up at step s, then times a half cosine.

    Args:
        optimizer: Its learning rates are the peak.
        num_warmup_steps: Steps until the peak.
        num_training_steps: The step at which the rate reaches zero; it stays there.

    Source: Loshchilov and Hutter, SGDR (https://arxiv.org/abs/1608.03983), eq. 5, one period.
    """

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            # Not from zero: the first step would be lost.
            return (step + 1) / num_warmup_steps
        decay_steps = max(1, num_training_steps - num_warmup_steps)
        progress = min(1.0, (step - num_warmup_steps) / decay_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
