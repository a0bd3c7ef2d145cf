"""What a replay of a CUDA graph would leave out is found as a plain call is watched.

Replays themselves are tested in tests/gpu.
"""

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowjobs.models.dit import DiT
from flowjobs.models.mlp import MLP
from flowjobs.models.unet import UNet
from flowjobs.training.cuda_graph import Graphed, _watched


@pytest.fixture(autouse=True)
def gpu_that_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)


class Changing(nn.Module):
    """A layer whose forward also does something else."""

    mean: Tensor
    calls = 0

    def __init__(self, does: Callable[["Changing"], object]) -> None:
        super().__init__()
        self.layer = nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.seen = torch.zeros(1)
        self.count = 0
        self.steps: list[int] = []
        self.by_name = {"a": [1]}
        self.numbers = itertools.count()
        self.own = random.Random(0)
        self.numpy = np.random.default_rng(0)
        self.array = np.zeros(2)
        self.schedule = SimpleNamespace(step=0)
        called: list[int] = []
        self.function = lambda: called.append(1)
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
        (lambda of: next(of.numbers), "numbers"),
        (lambda of: of.own.random(), "own"),
        (lambda of: of.numpy.random(), "numpy"),
        (lambda of: of.array.__iadd__(1), "array"),
        (lambda of: setattr(of.schedule, "step", of.schedule.step + 1), "schedule"),
        (lambda of: of.function(), "function"),
        (lambda of: setattr(Changing, "calls", Changing.calls + 1), "Changing.calls"),
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
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.register_post_accumulate_grad_hook(lambda weights: None)
    (reason,) = found(model, torch.randn(8, 4))
    assert reason.startswith("0.weight has hooks")


@pytest.mark.parametrize("kind", [MLP, UNet, DiT])
def test_every_built_in_can_be_replayed(kind: Callable[[int], nn.Module]) -> None:
    assert not found(kind(64), torch.randn(8, 64), torch.rand(8))


def test_what_a_flow_counts_is_found() -> None:
    flow = SimpleNamespace(calls=0)
    with _watched(nn.Linear(2, 2), flow) as reasons:
        flow.calls += 1
    assert [reason for reason in reasons if "SimpleNamespace" in reason]


def compared(before: float, expected: float, found: float, *, exact: bool = False) -> bool:
    graphed = Graphed("It is", lambda: (), (nn.Linear(1, 1),), list, exact=exact)
    return graphed._is_as_good(*(torch.full((3,), of) for of in (before, expected, found)))


def test_a_replay_must_do_to_each_tensor_what_a_plain_call_does() -> None:
    assert compared(1.0, 1.5, 1.5, exact=True)
    assert not compared(1.0, 1.5, 1.5 + 1e-6, exact=True)
    assert compared(1.0, 1.5, 1.5 + 1e-6)
    assert not compared(1.0, 1.5, 1.0)
    assert not compared(1.0, 1.5, 1.51)
    assert not compared(1.0, 1.00001, 1.0)  # where it does not move at all
    assert not compared(1.0, 1.0, 1.001)
    assert not compared(1.0, 1.5, float("nan"))
