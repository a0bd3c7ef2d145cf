"""Samples of a trained model, and their picture."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from flowjobs.runs.files import replaced_whole
from flowjobs.training.randomness import generator_for
from flowjobs.training.velocity import checked_velocity, input_dtype

# Side of the picture in pixels, and of one digit in it.
PICTURE_SIDE = 480
DIGIT_SIDE = 96
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


def draw_digits(path: Path, samples: Tensor) -> None:
    """Write a picture of 8 x 8 digits with values from 0 to 16, five in a row.

    Args:
        path: The .png file.
        samples: Shape (n, 64).
    """
    levels = (samples / 16).clamp(0, 1).mul(255).round().to(torch.uint8).reshape(-1, 8, 8)
    rows = (len(levels) + 4) // 5
    picture = Image.new("L", (5 * DIGIT_SIDE, rows * DIGIT_SIDE))
    for index, digit in enumerate(levels.numpy()):
        corner = (index % 5 * DIGIT_SIDE, index // 5 * DIGIT_SIDE)
        picture.paste(Image.fromarray(digit).resize((DIGIT_SIDE, DIGIT_SIDE)), corner)
    _save(picture, path)


def draw_projection(path: Path, samples: Tensor, reference: Tensor) -> None:
    """Write a picture of samples (blue) over data (grey) along the data's two main directions.

    Args:
        path: The .png file.
        samples: Shape (n, dim).
        reference: Data to compare with, shape (m, dim).
    """
    reference, samples = reference.double(), samples.double()
    centre = reference.mean(0)
    directions = torch.linalg.svd(reference - centre, full_matrices=False).Vh[:2]
    data, drawn = (reference - centre) @ directions.T, (samples - centre) @ directions.T
    if data.shape[1] == 1:
        data, drawn = (torch.nn.functional.pad(points, (0, 1)) for points in (data, drawn))
    reach = 1.2 * data.abs().amax(0).clamp_min(1e-12)
    picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), "white")
    pen = ImageDraw.Draw(picture)
    for points, colour in ((data, (170, 170, 170)), (drawn, (20, 80, 220))):
        for x, y in ((points / reach + 1) * PICTURE_SIDE / 2).tolist():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    _save(picture, path)


def _save(picture: Image.Image, path: Path) -> None:
    with replaced_whole(path) as file:
        picture.save(file, format="PNG")
