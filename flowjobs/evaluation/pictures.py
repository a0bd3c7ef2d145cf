"""Pictures of samples."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from flowjobs.runs.files import replaced_whole

# Side of a picture in pixels, and of one digit in it.
PICTURE_SIDE = 480
DIGIT_SIDE = 96


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
