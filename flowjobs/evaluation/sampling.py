"""Samples of a trained model."""

import torch
from torch import Tensor, nn

from flowjobs.data.randomness import generator_for
from flowjobs.models.velocity import checked_velocity, input_dtype

STEPS = 50


@torch.no_grad()
def sample(
    model: nn.Module, n: int, stats: dict[str, Tensor], device: torch.device, seed: int = 0
) -> Tensor:
    """Draw noise and follow the model's velocity from t = 0 to t = 1.

    Integrates with torchdiffeq's midpoint method in STEPS steps: a fixed number, since an adaptive
    method can take minutes on a model that is not smooth.

    Args:
        model: The velocity, on `device`.
        n: How many samples.
        stats: Normalization of the data, which is undone: `mean` and `std` of shape (dim,).
        device: Where to compute.
        seed: Seed of the noise.

    Returns:
        Samples in the data's own units, on the CPU, shape (n, dim), of the type of `stats`.
    """
    from torchdiffeq import odeint  # loads scipy, which the start of a run does without

    mean, std = stats["mean"].to(device), stats["std"].to(device)
    generator = generator_for(device, seed, "samples")
    x_0 = torch.randn((n, len(mean)), generator=generator, device=device, dtype=torch.float32)
    model_velocity = checked_velocity(model, input_dtype(model), type(model).__name__)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return model_velocity(x, t.repeat(len(x)))  # its own memory, which a model may change

    times = torch.tensor([0.0, 1.0], device=device, dtype=torch.float32)
    options = {"step_size": 1 / STEPS}
    x_1 = odeint(velocity, x_0, times, method="midpoint", options=options)[-1]
    samples: Tensor = (x_1 * std + mean).cpu()
    return samples
