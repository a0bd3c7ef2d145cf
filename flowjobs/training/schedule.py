"""The learning rate: a linear warm-up, then a cosine to zero."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flowjobs.learning_rate import learning_rate_factor


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int
) -> LambdaLR:
    """The optimizer's learning rate times (s + 1) / warm-up at step s, then times a half cosine.

    Args:
        optimizer: Its learning rates are the peak.
        num_warmup_steps: Steps until the peak.
        num_training_steps: The step at which the rate reaches zero; it stays there.
    """

    def factor(step: int) -> float:
        return learning_rate_factor(step, num_warmup_steps, num_training_steps)

    return LambdaLR(optimizer, factor)
