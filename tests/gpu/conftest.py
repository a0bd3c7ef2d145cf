"""What only a GPU shows: skipped, in words, where there is none."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


@pytest.fixture(autouse=True)
def device() -> "torch.device":
    """The GPU that a test of this folder computes on."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none")
    return torch.device("cuda", 0)
