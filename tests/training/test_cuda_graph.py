"""What a replay of a CUDA graph would leave out is found as a plain call is watched.

Replays themselves are tested in tests/gpu.
"""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowjobs.models.dit import DiT
from flowjobs.models.mlp import MLP
from flowjobs.models.unet import UNet
from flowjobs.training.cuda_graph import _watched


@pytest.fixture(autouse=True)
def gpu_that_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)


class Changing(nn.Module):
    """A layer whose forward also does something else."""

    mean: Tensor

    def __init__(self, does: Callable[["Changing"], object]) -> None:
        super().__init__()
        self.layer = nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.seen = torch.zeros(1)
        self.count = 0
        self.steps: list[int] = []
        self.by_name = {"a": [1]}
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        self.does(self)
        y: Tensor = self.layer(x)
        return y


def found(model: nn.Module, *inputs: Tensor) -> list[str]:
    with _watched(model) as reasons:
        model(*inputs).sum().backward()
    return reasons


@pytest.mark.parametrize(
    ("does", "word"),
    [
        (lambda of: setattr(of, "count", of.count + 1), "count"),
        (lambda of: setattr(of, "mean", 0.9 * of.mean), "mean"),
        (lambda of: of.steps.append(1), "steps"),
        (lambda of: of.by_name["a"].append(2), "by_name"),
        (lambda of: of.seen.add_(1), "seen"),
        (lambda of: random.random(), "random"),
        (lambda of: np.random.rand(), "random"),
        (lambda of: torch.rand(1), "random"),
    ],
)
def test_what_forward_does_in_python_is_found(
    does: Callable[[Changing], object], word: str
) -> None:
    (reason,) = found(Changing(does), torch.randn(8, 4))
    assert word in reason


def test_what_forward_writes_in_place_is_replayed() -> None:
    assert not found(Changing(lambda of: of.mean.mul_(0.9)), torch.randn(8, 4))


def test_hooks_are_not_replayed() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert not found(model, torch.randn(8, 4))
    model[0].register_forward_hook(lambda *given: None)
    (reason,) = found(model, torch.randn(8, 4))
    assert reason.startswith("0 has hooks")


@pytest.mark.parametrize("kind", [MLP, UNet, DiT])
def test_every_built_in_can_be_replayed(kind: Callable[[int], nn.Module]) -> None:
    assert not found(kind(64), torch.randn(8, 64), torch.rand(8))
