"""Interrupted equals uninterrupted, at any step, also for models with state and chance."""

import contextlib
import itertools
import os
import random
import resource
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import RunInterrupted, RunTakenOverError
from flowjobs.field_values import KeyValues
from flowjobs.flows.flow import Flow
from flowjobs.models.build import build_model
from flowjobs.runs import attempt
from flowjobs.runs.attempt import Attempt
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training import FlowDataset, FlowTrainer, saving
from flowjobs.training.checkpoint import read_checkpoint, write_checkpoint
from flowjobs.training.determinism import (
    CUBLAS_WORKSPACE,
    deterministic_algorithms,
    set_cublas_workspace,
)
from flowjobs.training.trainer import Trainer
from tests.training.same import same

CPU = torch.device("cpu")
STEPS_PER_EPOCH = 5
CONFIG = TrainingConfig(
    epochs=4, batch_size=8, warmup_steps=3, arch_args=KeyValues(width=16, depth=1, dropout=0.2)
)


def data(n: int, seed: int) -> FlowDataset:
    return FlowDataset(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)))


def train(run: Run, config: TrainingConfig, steps: int | None = None) -> None:
    """One attempt: to the end, or that many steps."""
    run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
    if config.compile:
        torch.compiler.reset()  # a new process has compiled nothing yet
    boundaries = itertools.count(1)
    with recording(run, JobInfo.in_foreground()) as recorder:
        Trainer(
            build_model(config, 6),
            config,
            data(8 * STEPS_PER_EPOCH + 3, seed=1),
            data(20, seed=2),
            CPU,
            run=run,
            recorder=recorder,
            stop_reason=lambda: "test" if next(boundaries) == steps else None,
        ).train()


def assert_equal(first: Run, second: Run) -> None:
    assert same(read_checkpoint(first.last), read_checkpoint(second.last))
    assert same(read_checkpoint(first.best), read_checkpoint(second.best))
    assert list(read_rows(first.metrics_file)) == list(read_rows(second.metrics_file))


def interrupt_everywhere(study: Path, config: TrainingConfig, every: int) -> None:
    """Compare a whole run with one that leaves after every so many steps."""
    whole, parts = Run(study, "whole"), Run(study, "parts")
    train(whole, config)
    for _ in range(1000):
        try:
            train(parts, config, steps=every)
        except RunInterrupted:
            continue
        break
    assert_equal(whole, parts)


@pytest.mark.parametrize("every", [1, 2, STEPS_PER_EPOCH])
def test_a_run_may_leave_after_every_step(study: Path, every: int) -> None:
    interrupt_everywhere(study, CONFIG, every)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"flow": "otcfm", "sigma": 0.1},
        {"data_placement": "loader", "num_workers": 1},
        {"checkpoint_every_s": 0.0, "ema_decay": 0.5},
    ],
)
def test_so_it_is_with_every_kind_of_step(study: Path, options: dict[str, Any]) -> None:
    interrupt_everywhere(study, replace(CONFIG, **options), every=3)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_so_it_is_with_a_compiled_model(study: Path) -> None:
    interrupt_everywhere(study, replace(CONFIG, compile=True), every=7)


@pytest.mark.parametrize("every", [1, STEPS_PER_EPOCH])
def test_patience_and_ties_count_alike(study: Path, every: int) -> None:
    # With a rate of nearly zero and an average that hardly moves, losses tie from epoch to epoch.
    config = replace(CONFIG, epochs=30, patience=3, lr=1e-30, weight_decay=0.0)
    interrupt_everywhere(study, config, every)
    assert read_checkpoint(Run(study, "parts").last)["epochs_without_improvement"] == 3
    assert read_checkpoint(Run(study, "parts").best)["epoch"] == 0


class Moody(nn.Module):
    """State in buffers, one of them put anew at each step, and chance from three libraries."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim + 1, dim)
        self.norm = nn.BatchNorm1d(dim)
        self.directions = torch.from_numpy(np.random.randn(dim)).float() + random.random()
        self.register_buffer("level", torch.zeros(dim))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.mean(0)
            x = x * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand()) + torch.rand(1)
        out = self.linear(torch.cat([x - self.level, t.unsqueeze(-1)], dim=-1))
        return self.norm(out) + self.directions


def test_a_model_with_buffers_and_chance_of_its_own_ends_the_same(study: Path) -> None:
    config = TrainingConfig(epochs=4, batch_size=8, arch=f"{__name__}:Moody")
    interrupt_everywhere(study, config, every=3)
    best = read_checkpoint(Run(study, "parts").best)
    for key in ("level", "norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(best["ema_shadow"][key], best["model_state_dict"][key])
    assert best["model_state_dict"]["level"].abs().sum() > 0


class FromASet(nn.Module):
    """Has its layers in another order in each process, as one does that makes them from a set."""

    order: ClassVar[tuple[str, ...]] = ("in", "mix", "out", "tied", "in_2")

    def __init__(self, dim: int) -> None:
        super().__init__()
        made = {
            "in": nn.Linear(dim, 9),
            "in_2": nn.Linear(dim, 9),
            "mix": nn.Linear(9, 9, bias=False),
            "out": nn.Linear(9, dim),
        }
        made["tied"] = made["mix"]
        self.layers = nn.ModuleDict({name: made[name] for name in self.order})

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = torch.tanh(self.layers["in"](x)) * self.layers["in_2"](x) + t.unsqueeze(-1)
        return self.layers["out"](both + self.layers["mix"](both))


@pytest.mark.parametrize("of_older_version", [False, True])
def test_a_model_whose_layers_come_in_another_order_each_time_ends_the_same(
    study: Path, monkeypatch: pytest.MonkeyPatch, of_older_version: bool
) -> None:
    config = TrainingConfig(epochs=2, batch_size=8, lr=0.01, arch=f"{__name__}:FromASet")
    whole, parts = Run(study, "whole"), Run(study, "parts")
    train(whole, config)
    for order in itertools.permutations(FromASet.order):  # the first is that of the whole run
        monkeypatch.setattr(FromASet, "order", order)
        try:
            train(parts, config, steps=2)
        except RunInterrupted:
            payload = read_checkpoint(parts.last)
            if of_older_version and payload["step"] == 2:
                payload.pop("optimizer_weights", None)  # which has the order of the model's state
                write_checkpoint(parts.last, payload)
            continue
        break
    assert_equal(whole, parts)


def moody_path(
    x_0: Tensor, x_1: Tensor, t: Tensor, sigma: float, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    shift = torch.rand(1) + random.random() + float(np.random.rand())
    return x_0.lerp(x_1, t) + shift * t, x_1 - x_0 + shift


def moody_plan(x_0: Tensor, x_1: Tensor, sigma: float, seed: int) -> Tensor:
    plan = torch.randperm(len(x_0))[np.random.permutation(len(x_0))]
    return plan.roll(random.randrange(len(plan)))


MOODY_COUPLING = Flow(moody_path, couple=moody_plan)


@pytest.mark.parametrize(
    ("flow", "ot_batch"), [("moody_path", None), ("MOODY_COUPLING", None), ("MOODY_COUPLING", 16)]
)
def test_a_flow_with_chance_of_its_own_ends_the_same(
    study: Path, flow: str, ot_batch: int | None
) -> None:
    config = replace(CONFIG, flow=f"{__name__}:{flow}", ot_batch=ot_batch, num_workers=1)
    interrupt_everywhere(study, config, every=3)


def test_a_full_disk_in_the_middle_of_a_run_changes_nothing(
    study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, filled = Run(study, "whole"), Run(study, "filled")
    config = replace(CONFIG, epochs=60, patience=60, checkpoint_every_s=0.0)
    train(whole, config)
    monkeypatch.setattr(saving, "COST_SHARE", 1e9)  # a save whenever none is under way
    monkeypatch.setattr(attempt, "STATUS_EVERY_S", 0.0)
    with small_files_only(filled, steps=range(50, 250)):
        train(filled, config)
    said = [record.getMessage() for record in caplog.records]
    assert any("the next save tries again" in text for text in said)
    assert sum("rows wait in memory" in text for text in said) == 1
    assert_equal(whole, filled)


@contextlib.contextmanager
def small_files_only(run: Run, steps: range) -> Iterator[None]:
    """While these steps are trained, no file of the process may grow over a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = Trainer._step

    def step(trainer: Trainer) -> dict[str, float]:
        if trainer.state.step in (steps.start, steps.stop):
            # A save that is under way ends under the limit that it began with.
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
        if trainer.state.step == steps.start:
            resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics_file.stat().st_size + 7, -1))
        if trainer.state.step == steps.stop:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return real(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)


def test_an_attempt_that_has_lost_the_run_stops_and_writes_nothing_more(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(study, "run")
    with pytest.raises(RunInterrupted):
        train(run, CONFIG, steps=7)

    def check_held(attempt: Attempt) -> None:
        raise RunTakenOverError("job 2 holds the run")

    monkeypatch.setattr(Attempt, "check_held", check_held)
    monkeypatch.setattr(saving, "COST_SHARE", 1e9)
    before = {file: file.read_bytes() for file in run.checkpoints.iterdir()}
    with pytest.raises(RunTakenOverError, match="job 2 holds the run"):
        train(run, replace(CONFIG, epochs=5000, patience=5000, checkpoint_every_s=0.0))
    assert {file: file.read_bytes() for file in run.checkpoints.iterdir()} == before
    assert max(row["step"] for row in read_rows(run.metrics_file)) < 5000 * STEPS_PER_EPOCH


def test_a_run_that_is_lost_between_two_saves_stops_too(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(study, "run")
    with pytest.raises(RunInterrupted):
        train(run, CONFIG, steps=7)
    before = {file: file.read_bytes() for file in run.checkpoints.iterdir()}
    real = Attempt.progress

    def progress(attempt: Attempt, step: int, *rest: Any) -> None:
        if step == 10:
            raise RunTakenOverError("job 2 holds the run")
        assert step < 10
        real(attempt, step, *rest)

    monkeypatch.setattr(Attempt, "progress", progress)
    with pytest.raises(RunTakenOverError, match="job 2 holds the run"):
        train(run, CONFIG)
    assert {file: file.read_bytes() for file in run.checkpoints.iterdir()} == before


def test_what_killed_attempts_left_is_swept_at_the_next_start(study: Path) -> None:
    run = Run(study, "run")
    with pytest.raises(RunInterrupted):
        train(run, CONFIG, steps=7)
    for name in (".last.pt.n1-7.tmp", ".best.pt.n1-7.tmp", ".last.pt.7.link"):
        (run.checkpoints / name).write_bytes(b"half")
    train(run, CONFIG)
    assert not list(run.checkpoints.glob(".*"))


class Watching(nn.Linear):
    """Notes what is set while it computes, and what cuBLAS found also where a copy did before."""

    workspaces: ClassVar[list[str | None]] = []

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        self.seen: list[tuple[object, ...]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.append(settings())
        self.workspaces.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return super().forward(x)


def settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_holds_while_the_run_trains_and_no_longer(
    workplace: Path, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = settings()
    model = Watching(6)
    model.workspaces.clear()
    config = TrainingConfig(epochs=1, batch_size=8, deterministic=wanted)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trainer = FlowTrainer(model, config, data(40, 1), data(20, 2), CPU)
    assert model.workspaces  # the first product on a GPU is where FLOPs are counted
    trainer.train()
    assert set(model.workspaces) == {CUBLAS_WORKSPACE if wanted else None}
    expected = (True, False, True, False, False) if wanted else before
    assert set(model.seen) == {expected}
    assert settings() == before


def test_what_was_set_before_is_set_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_cublas_workspace()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        with contextlib.suppress(ZeroDivisionError), deterministic_algorithms(True):
            raise ZeroDivisionError
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_changes_no_bit_on_a_cpu(study: Path) -> None:
    plain, deterministic = Run(study, "plain"), Run(study, "deterministic")
    train(plain, CONFIG)
    train(deterministic, replace(CONFIG, deterministic=True))
    for part in ("model_state_dict", "ema_shadow", "optimizer_state_dict"):
        assert same(read_checkpoint(plain.last)[part], read_checkpoint(deterministic.last)[part])
