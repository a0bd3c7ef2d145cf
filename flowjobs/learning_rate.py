"""The learning rate of a step, as a function that knows no optimizer."""

import math


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """The learning rate at a step as a part of its peak: a linear warm-up, then a half cosine.

    Source: Loshchilov and Hutter, SGDR (https://arxiv.org/abs/1608.03983), eq. 5, one period.
    """
    if step < warmup_steps:
        # Not from zero: the first step would be lost.
        return (step + 1) / warmup_steps
    decay_steps = max(1, total_steps - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
