"""What a replay of a CUDA graph would leave out is found as a plain call is watched.

Replays themselves are tested in tests/gpu.
"""

import dataclasses
import itertools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

from flowjobs.models.dit import DiT
from flowjobs.models.mlp import MLP
from flowjobs.models.unet import UNet
from flowjobs.runs.run import Run
from flowjobs.training import cuda_graph
from flowjobs.training import watched as watching
from flowjobs.training.cuda_graph import Graphed
from flowjobs.training.trainer import Trainer
from flowjobs.training.watched import watched
from tests.gpu.runs import CONFIG, INTERRUPTED_AT, assert_same_bits, train, train_in_parts

CPU = torch.device("cpu")


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
    with watched(model) as reasons:
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


class Odd:
    """Answers every name, knows no length, and is equal to nothing."""

    def __getattr__(self, name: str) -> object:
        raise KeyError(name)

    def __len__(self) -> int:
        raise TypeError("ambiguous")

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]


def test_whatever_a_model_holds_that_stays_as_it_is_keeps_no_graph_away() -> None:
    model = Changing(lambda of: None)
    model.layer = nn.Linear(4, 4)
    with torch.inference_mode():
        model.inferred = torch.ones(2)
    model.logger, model.module, model.nothing = logging.getLogger(), random, float("nan")
    model.matrix, model.itself = scipy.sparse.csr_matrix(np.eye(3)), [model]
    model.table = [[*range(5000)] for _ in range(100)]
    circle: list[object] = [Odd()]
    circle.append(circle)
    model.circle = circle
    assert not found(model, torch.randn(8, 4))


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
    with watched(nn.Linear(2, 2), flow) as reasons:
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


class GeneratorOfAGpu:
    """The CPU's, in its place."""

    device = CPU
    get_state = staticmethod(torch.get_rng_state)
    set_state = staticmethod(torch.set_rng_state)

    def graphsafe_set_state(self, generator: torch.Generator) -> None:
        """Nothing is captured."""


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run on the CPU decide and keep its record as on a GPU; a replay calls the function."""

    def prepare(trainer: Trainer) -> None:
        trainer._was_captured = False
        state, flow = trainer.state, trainer._flow
        trainer._graphed_update = Graphed(
            "The steps are", trainer._update, (state.model, flow), state.changing, exact=True
        )
        trainer._graphed_validation = Graphed(
            "Validation is", trainer._validate, (state.ema.model, flow), state.changing, exact=True
        )

    monkeypatch.setattr(Trainer, "_prepare_graphs", prepare)
    monkeypatch.setattr(cuda_graph, "_Replay", lambda function, *inputs: function)
    monkeypatch.setattr(watching, "_generators", lambda: ())  # the GPU's are no matter
    monkeypatch.setattr(torch.cuda, "default_generators", (GeneratorOfAGpu(),))
    for name, value in {
        **dict.fromkeys(("current_device", "memory_allocated", "memory_reserved"), 0),
        **dict.fromkeys(("current_stream", "set_stream"), None),
        "Event": SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1.0
        ),
        "max_memory_allocated": 1,
        "reset_peak_memory_stats": None,
        "mem_get_info": (10**12, 10**12),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value, **named: value)


@pytest.mark.parametrize("options", [{}, {"flow": "otcfm"}, {"patience": 1, "lr": 0.1}], ids=str)
def test_a_run_of_replays_ends_with_the_record_and_the_bits_of_plain_steps(
    study: Path, request: pytest.FixtureRequest, options: dict[str, Any]
) -> None:
    config = dataclasses.replace(CONFIG, **options)
    plain, whole, parts = (Run(study, name) for name in ("plain", "whole", "parts"))
    assert not train(plain, config, CPU).captured
    request.getfixturevalue("replays")
    assert train(whole, config, CPU).captured
    assert_same_bits(plain, whole)
    train_in_parts(parts, config, CPU, INTERRUPTED_AT)
    assert_same_bits(plain, parts)


@pytest.mark.usefixtures("replays")
def test_where_a_capture_fails_steps_stay_plain_and_say_why(
    study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(function: object, *inputs: Tensor) -> object:
        raise RuntimeError("operation not permitted when stream is capturing\nfor more: …")

    monkeypatch.setattr(cuda_graph, "_Replay", fails)
    with caplog.at_level("INFO"):
        assert not train(Run(study, "a"), CONFIG, CPU).captured
    words = "The steps are not captured in a CUDA graph: operation not permitted when stream is"
    assert caplog.text.count(words) == 1


@pytest.mark.usefixtures("replays")
def test_a_replay_that_does_something_else_is_not_kept(
    study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Run(study, "plain")
    train(plain, dataclasses.replace(CONFIG, epochs=2), CPU)
    monkeypatch.setattr(
        cuda_graph, "_Replay", lambda function, *inputs: lambda *given: (inputs[0],) * 2
    )
    other = Run(study, "other")
    with caplog.at_level("INFO"):
        assert not train(other, dataclasses.replace(CONFIG, epochs=2), CPU).captured
    assert "a replay does not give what a plain call gives" in caplog.text
    assert_same_bits(plain, other)


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize(("noise", "is_kept"), [(1e-3, True), (0.0, False)])
def test_what_is_noise_in_plain_calls_may_be_noise_in_replays(
    monkeypatch: pytest.MonkeyPatch, noise: float, is_kept: bool
) -> None:
    weights, generator = torch.zeros(100), torch.Generator().manual_seed(0)

    def call(size: float) -> tuple[Tensor]:
        weights.add_(size * torch.randn(100, generator=generator))
        return (torch.ones(()),)

    monkeypatch.setattr(cuda_graph, "_Replay", lambda *given: lambda: call(1e-3))
    model = nn.Linear(1, 1)
    graphed = Graphed("It is", lambda: call(noise), (model,), lambda: [weights], exact=False)
    for _ in range(5):
        graphed()
    assert graphed.captured is is_kept
