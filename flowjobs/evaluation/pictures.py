"""Pictures of samples."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from flowjobs.runs.datasets import DIGITS
from flowjobs.runs.files import replaced_whole

# Side of a picture of points, in pixels.
PICTURE_SIDE = 480
# Side of one picture among many, the gap around it, and the gap's grey.
TILE_SIDE = 96
GAP = 8
GAP_LEVEL = 96
MOST_TILES = 64
# Side and largest value of scikit-learn's digits.
DIGIT_SIDE, DIGIT_MOST = 8, 16


def draw_samples(
    path: Path, dataset: str, samples: Tensor, reference: Callable[[], Tensor]
) -> None:
    """Write a picture of samples: digits as a grid of the first MOST_TILES, else points over data.

    Args:
        path: The .png file.
        dataset: `--dataset` of the run.
        samples: Shape (n, *shape).
        reference: Gives the data to compare with, shape (m, *shape), where they are needed.
    """
    if dataset == DIGITS and samples[0].numel() == DIGIT_SIDE**2:
        tiles = samples[:MOST_TILES].reshape(-1, DIGIT_SIDE, DIGIT_SIDE)
        draw_grid(path, tiles / DIGIT_MOST)
    else:
        draw_projection(path, samples, reference())


def draw_grid(path: Path, images: Tensor) -> None:
    """Write pictures side by side, with gaps between, about as many in a row as in a column.

    Args:
        path: The .png file.
        images: Values from 0 (black) to 1, shape (n, height, width). A side is shown at about
            TILE_SIDE pixels, each pixel as a square.
    """
    levels = images.double().clamp(0, 1).mul(255).round().to(torch.uint8)
    n, height, width = levels.shape
    scale = max(1, round(TILE_SIDE / max(height, width)))
    columns = math.ceil(math.sqrt(n))
    step_y, step_x = height * scale + GAP, width * scale + GAP
    size = (columns * step_x + GAP, math.ceil(n / columns) * step_y + GAP)
    picture = Image.new("L", size, GAP_LEVEL)
    for index, image in enumerate(levels.numpy()):
        tile = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BOX)
        picture.paste(tile, (GAP + index % columns * step_x, GAP + index // columns * step_y))
    _save(picture, path)


def draw_projection(path: Path, samples: Tensor, reference: Tensor) -> None:
    """Write a picture of samples (blue) over data (grey) along the data's two main directions.

    Args:
        path: The .png file.
        samples: Shape (n, *shape).
        reference: Data to compare with, shape (m, *shape).
    """
    reference, samples = reference.double().flatten(1), samples.double().flatten(1)
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
