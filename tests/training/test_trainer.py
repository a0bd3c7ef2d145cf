import itertools
import json
import math
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import flowjobs
from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.data.dataset import load_datasets
from flowjobs.errors import (
    CheckpointMismatchError,
    CheckpointWriteError,
    MeasuringInterrupted,
    RunInterrupted,
    RunMismatchError,
    TrainingDivergedError,
)
from flowjobs.field_values import KeyValues
from flowjobs.models.build import build_model
from flowjobs.models.flops import flops_per_sample, parameters_in
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training import FlowDataset, FlowTrainer
from flowjobs.training.checkpoint import read_checkpoint, write_checkpoint
from flowjobs.training.run_training import draw_and_measure
from flowjobs.training.saving import CheckpointSaver
from flowjobs.training.state import TrainState
from flowjobs.training.trainer import Trainer
from flowjobs.training.validation import Validation
from tests.evaluation.drawing import sample
from tests.training.same import same

CPU = torch.device("cpu")
SMALL = KeyValues(width=32, depth=1, dropout=0.1)


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def make_trainer(study: Path, config: TrainingConfig, **options: Any) -> Trainer:
    train, val = load_datasets(config.dataset, study)
    model = options.pop("model", None) or build_model(config, train.dim)
    kind = Trainer if "run" in options else FlowTrainer
    return kind(model, config, train, val, CPU, **options)


def stop_at(trainer_steps: int) -> Any:
    asked = iter(range(trainer_steps + 1))
    return lambda: "test" if next(asked) == trainer_steps else None


def test_training_learns_and_leaves_what_the_seed_lists(study: Path) -> None:
    config = TrainingConfig(epochs=20, lr=3e-3, warmup_steps=20)
    result = make_trainer(study, config).train()
    run = Run(study, "mlp-icfm-digits-none")
    assert (result["epochs_run"], result["final_epoch"]) == (20, 19)
    assert result["checkpoint_path"] == str(run.best)
    # Predicting the mean velocity, which is nearly zero, scores its variance.
    train, val = load_datasets("digits", study)
    stats = read_checkpoint(run.best)["normalization_stats"]
    normal = (val.data - stats["mean"]) / stats["std"]
    mean_velocity = 1 + normal.var(0).mean()
    assert result["best_val_loss"] < 0.75 * mean_velocity
    assert read_checkpoint(run.best)["best_loss"] == result["best_val_loss"]
    assert read_checkpoint(run.last)["step"] == result["steps"] == 20 * (len(train) // 64)
    status = run.status()
    sizes = (status.parameters, status.flops_per_sample)
    model = build_model(config, 64)
    assert sizes == (parameters_in(model), flops_per_sample(model, (64,)))


def test_rows_have_the_seeds_keys_at_the_seeds_steps(study: Path) -> None:
    make_trainer(study, TrainingConfig(epochs=3, arch_args=SMALL)).train()
    rows = list(read_rows(Run(study, "mlp-icfm-digits-none").metrics_file))
    train_keys = {"train/loss", "train/grad_norm", "train/lr"}
    val_keys = {"val/loss", "val/best_loss"}
    for row in rows:
        at_tenth, at_epoch_end = row["step"] % 10 == 0, row["step"] % 23 == 0
        expected = {"step", "epoch"}
        expected |= train_keys if at_tenth else set()
        expected |= val_keys if at_epoch_end else set()
        assert set(row) == expected
    assert [row["step"] for row in rows] == [10, 20, 23, 30, 40, 46, 50, 60, 69]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("flow", ["icfm", "otcfm"])
@pytest.mark.parametrize("stops", [(1,), (23,), (30, 5, 1)])
def test_interrupted_equals_uninterrupted(study: Path, flow: Any, stops: tuple[int, ...]) -> None:
    config = TrainingConfig(flow=flow, epochs=3, arch_args=SMALL, sigma=0.1)
    whole, parts = Run(study, "whole"), Run(study, "parts")
    rows = {}
    for run in (whole, parts):
        for steps in stops if run is parts else ():
            with pytest.raises(RunInterrupted):
                train_in(run, config, stop_reason=stop_at(steps))
        train_in(run, config)
        rows[run.name] = list(read_rows(run.metrics_file))
    assert same(read_checkpoint(whole.last), read_checkpoint(parts.last))
    assert same(read_checkpoint(whole.best), read_checkpoint(parts.best))
    assert rows["whole"] == rows["parts"]


class Draws(nn.Module):
    """One of the user's own that draws and counts its calls wherever it is called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        velocity: torch.Tensor = self.linear(x + torch.rand(1)) + self.calls
        return velocity


def a_notebooks_trainer(model: nn.Module, epochs: int = 2, **options: Any) -> FlowTrainer:
    data = [FlowDataset(torch.randn(n, 3, generator=torch.Generator())) for n in (64, 40)]
    config = TrainingConfig(epochs=epochs, batch_size=16)
    return FlowTrainer(model, config, *data, CPU, name="mine", **options)


def test_training_leaves_the_default_generators_as_they_were(study: Path) -> None:
    """So that a script's next model starts from other weights than its last one did."""

    def states() -> list[Any]:
        return [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]

    first, second = Draws(), Draws()
    before = states()
    with pytest.raises(RunInterrupted):
        a_notebooks_trainer(first, stop_reason=stop_at(5)).train()
    assert same(before, states())
    a_notebooks_trainer(second).train()
    assert same(before, states())


def test_a_model_that_best_pt_was_loaded_into_can_be_trained_further(study: Path) -> None:
    model, asked = Draws(), itertools.count(1)
    interrupted = a_notebooks_trainer(
        model, stop_reason=lambda: "test" if next(asked) == 5 else None
    )
    with pytest.raises(RunInterrupted):
        interrupted.train()
    assert len(flowjobs.load("mine", model=model).sample(3)) == 3
    assert interrupted.train()["epochs_run"] == 2
    for epochs in (2, 3):  # the cells once more, and more epochs
        assert not flowjobs.load("mine", model=model).sample(3).requires_grad
        assert a_notebooks_trainer(model, epochs).train()["epochs_run"] == epochs


def test_weights_of_a_compiled_model_load_into_a_plain_one_and_into_no_other(study: Path) -> None:
    a_notebooks_trainer(Draws(), epochs=1).train()
    best = Run(study, "mine").best
    expected = flowjobs.load("mine", model=Draws()).sample(3)
    payload = read_checkpoint(best)
    weights = payload["ema_shadow"].items()  # by the names that torch.compile(model) gives
    write_checkpoint(
        best, payload | {"ema_shadow": {f"_orig_mod.{key}": of for key, of in weights}}
    )
    assert torch.equal(flowjobs.load("mine", model=Draws()).sample(3), expected)
    with pytest.raises(CheckpointMismatchError, match=r"than the Linear that was given \(.*linear"):
        flowjobs.load("mine", model=nn.Linear(3, 3))


def train_on_few(run: Run, steps_per_epoch: int, **options: Any) -> Any:
    """Two epochs, each validated in three batches, of which one may be interrupted between two.

    Returns:
        The checkpoints and the rows.
    """
    generator = torch.Generator().manual_seed(1)
    data = [FlowDataset(torch.randn(n, 3, generator=generator)) for n in (16 * steps_per_epoch, 40)]
    config = TrainingConfig(flow="otcfm", epochs=2, batch_size=16)
    run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
    with recording(run, JobInfo.in_foreground()) as recorder:
        Trainer(Draws(), config, *data, CPU, run=run, recorder=recorder, **options).train()
    files = [read_checkpoint(file) for file in (run.last, run.best)]
    return files, list(read_rows(run.metrics_file))


def test_a_validation_that_is_interrupted_is_done_again(study: Path) -> None:
    whole = train_on_few(Run(study, "whole"), 2)
    for asked, step in ((1, 2), (2, 2), (6, 4)):  # also in the last one
        run = Run(study, f"parts{asked}")
        with pytest.raises(RunInterrupted) as interrupted:
            train_on_few(run, 2, stop_reason=stop_at(asked))
        assert interrupted.value.step == read_checkpoint(run.last)["step"] == step
        if step == 2:  # of the first epoch, which is validated once in another run as well
            another = Run(study, f"from{asked}")
            last, best = train_on_few(another, 2, resume_path=run.last)[0]
            assert same([last | {"resumed_from": ""}, best | {"resumed_from": ""}], whole[0])
        assert same(train_on_few(run, 2), whole)


@pytest.mark.parametrize("dies_in", [(Validation, "total"), (CheckpointSaver, "due")])
def test_an_epoch_of_one_step_is_validated_where_a_run_died_after_its_first_save(
    study: Path, monkeypatch: pytest.MonkeyPatch, dies_in: tuple[type, str]
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run = Run(study, "run")
    with monkeypatch.context() as patch:
        patch.setattr(*dies_in, dies)
        with pytest.raises(KeyboardInterrupt):
            train_on_few(run, 1)
    assert read_checkpoint(run.last)["step"] == 1
    assert not run.best.exists()
    assert same(train_on_few(run, 1), train_on_few(Run(study, "whole"), 1))


def train_in(run: Run, config: TrainingConfig, **options: Any) -> None:
    run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
    with recording(run, JobInfo.in_foreground()) as recorder:
        make_trainer(run.study, config, run=run, recorder=recorder, **options).train()


def test_rows_of_lost_work_come_once(study: Path) -> None:
    config = TrainingConfig(epochs=2, arch_args=SMALL)
    run = Run(study, "run")
    train_in(run, config)
    expected = run.metrics_file.read_bytes()
    # As after a SIGKILL: rows past the checkpoint, and a torn one.
    run.metrics_file.write_bytes(expected + b'{"step": 50, "epoch": 2}\n{"step": 6')
    train_in(run, config)
    assert run.metrics_file.read_bytes() == expected


def test_the_loader_gives_the_bits_of_resident_data(study: Path) -> None:
    payloads = []
    for placement in ("device", "loader"):
        config = TrainingConfig(epochs=2, arch_args=SMALL, data_placement=placement)
        run = Run(study, placement)
        train_in(run, config)
        payloads.append(read_checkpoint(run.last))
    assert same(payloads[0]["model_state_dict"], payloads[1]["model_state_dict"])
    assert payloads[0]["best_loss"] == payloads[1]["best_loss"]


def test_patience_ends_a_run_early(study: Path) -> None:
    # A learning rate of nearly zero: nothing improves after the first epochs by rounding alone.
    config = TrainingConfig(epochs=50, patience=2, lr=1e-12, arch_args=SMALL)
    result = make_trainer(study, config).train()
    assert result["epochs_run"] < 50
    state = read_checkpoint(Run(study, "mlp-icfm-digits-none").last)
    assert state["epochs_without_improvement"] == 2


def test_a_loss_that_is_no_number_fails_the_run(study: Path) -> None:
    config = TrainingConfig(epochs=5, lr=1e30, warmup_steps=0, arch_args=SMALL)
    with pytest.raises(TrainingDivergedError, match="lower --lr"):
        make_trainer(study, config).train()
    status = json.loads((study / "runs/mlp-icfm-digits-none/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)


def test_other_data_under_the_same_name_is_refused(study: Path) -> None:
    config = TrainingConfig(epochs=1, arch_args=SMALL)
    make_trainer(study, config).train()
    changed = FlowDataset(load_datasets("digits", study)[0].data + 1)
    val = load_datasets("digits", study)[1]
    with pytest.raises(RunMismatchError, match=r"train: 1527 rows .* then, 1527 rows .* now"):
        FlowTrainer(build_model(config, 64), config, changed, val, CPU).train()


def test_bf16_trains(study: Path) -> None:
    config = TrainingConfig(epochs=5, precision="bf16", arch_args=KeyValues(width=32))
    result = make_trainer(study, config).train()
    assert math.isfinite(result["best_val_loss"])
    weights = read_checkpoint(Path(result["checkpoint_path"]))["model_state_dict"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.long
def test_a_compiled_model_learns_the_same(study: Path, workplace: Path) -> None:
    best = {}
    for name, options in (("plain", ()), ("compiled", ("--compile",))):
        command = [sys.executable, "-m", "flowjobs", "train", "--name", name, "--epochs", "5"]
        arch = ("--arch-args", "width=32", "depth=1")
        subprocess.run([*command, *options, *arch], check=True)
        payload = read_checkpoint(Run(study, name).best)
        assert all("_orig_mod" not in key for key in payload["model_state_dict"])
        best[name] = payload["best_loss"]
    assert math.isclose(best["compiled"], best["plain"], rel_tol=0.01)
    assert best["compiled"] != best["plain"]  # other kernels round differently: it was compiled


def test_resuming_from_a_given_checkpoint(study: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flowjobs")
    make_trainer(study, TrainingConfig(epochs=1, arch_args=SMALL)).train()
    best = study / "checkpoints/mlp-icfm-digits-none/best.pt"
    config = TrainingConfig(epochs=2, arch_args=SMALL)
    result = make_trainer(study, config, resume_path=best).train()
    assert result["epochs_run"] == 2
    assert "extends mlp-icfm-digits-none from 1 to 2 epochs: the learning rate then" in caplog.text


def test_the_same_command_with_resume_goes_on_and_not_back(study: Path) -> None:
    origin, run = Run(study, "origin"), Run(study, "run")
    train_in(origin, TrainingConfig(epochs=1, arch_args=SMALL))
    config = TrainingConfig(epochs=3, arch_args=SMALL)
    with pytest.raises(RunInterrupted):
        train_in(run, config, resume_path=origin.last, stop_reason=stop_at(10))
    train_in(run, config, resume_path=origin.last)
    status = run.status()
    assert [attempt.first_step for attempt in status.attempts] == [23, 34]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_from_a_finished_run_has_a_best(study: Path, precision: Any) -> None:
    origin, run = Run(study, "origin"), Run(study, "run")
    config = TrainingConfig(epochs=1, arch_args=SMALL, precision=precision)
    train_in(origin, config)
    train_in(run, config, resume_path=origin.last)
    assert read_checkpoint(run.best)["best_loss"] == read_checkpoint(origin.best)["best_loss"]


def test_a_trained_run_that_is_sampled_leaves_at_the_next_network_call(study: Path) -> None:
    run, config = Run(study, "run"), TrainingConfig(epochs=1, arch_args=SMALL)
    train_in(run, config)
    calls: list[int] = []
    for to_leave_at in (3, 137):  # while the picture is drawn, and while a chunk is measured
        calls.clear()
        model = build_model(config, 64)
        model.register_forward_hook(lambda *_: calls.append(1))

        def stop_reason(at: int = to_leave_at) -> str | None:
            return "told to leave" if len(calls) >= at else None

        data = load_datasets("digits", study)
        with pytest.raises(MeasuringInterrupted, match="told to leave"):
            draw_and_measure(run, model, data, CPU, stop_reason)
        assert len(calls) == to_leave_at
        assert not run.evaluation_file.exists()


def test_the_first_step_of_an_extended_run_has_the_longer_schedules_rate(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flowjobs")
    short, long = (TrainingConfig(epochs=e, arch_args=SMALL, warmup_steps=5) for e in (1, 3))
    run = Run(study, "run")
    train_in(run, short)
    trainer = make_trainer(study, long, run=run)
    trainer._restore()
    half_cosine = 0.5 * (1 + math.cos(math.pi * (23 - 5) / (69 - 5)))
    rate = trainer.state.optimizer.param_groups[0]["lr"]
    assert math.isclose(rate, long.lr * half_cosine)
    assert f", the learning rate goes from 0 to {rate:.3g}" in caplog.text


def test_a_full_disk_in_the_middle_of_a_save_is_tried_again(
    study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, _ = load_datasets("digits", study)
    config = TrainingConfig(arch_args=KeyValues(width=256))
    stats = {"mean": torch.zeros(64), "std": torch.ones(64)}
    state = TrainState(build_model(config, train.dim), config, 23, stats, {})
    saver = CheckpointSaver(tmp_path / "best.pt", tmp_path / "last.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        saver.keep_best(state.payload())
        saver.save(state.payload())
        saver._collect()
        assert "could not be written" in caplog.text
        assert list(tmp_path.glob("*.pt")) == []
        with pytest.raises(CheckpointWriteError, match=r"File too large; it needs 4\.95 MB"):
            saver.save_and_wait(state.payload())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.save_and_wait(state.payload())
    saver.close()
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 0
    assert not list(tmp_path.glob(".*.tmp"))


class Shift(nn.Module):
    """Moves every point by the same vector in unit time."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def test_sampling_integrates_and_undoes_the_normalization() -> None:
    stats = {"mean": torch.tensor([5.0, -5.0]), "std": torch.tensor([0.5, 2.0])}
    drawn = sample(Shift(), 4000, stats, CPU).x_1
    assert torch.allclose(drawn.mean(0), torch.tensor([5.5, -3.0]), atol=0.15)
    assert torch.allclose(drawn.std(0), stats["std"], rtol=0.05)
    assert torch.equal(drawn, sample(Shift(), 4000, stats, CPU).x_1)


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_damaged_checkpoint_does_not_change_the_end(study: Path, which: str) -> None:
    config = TrainingConfig(epochs=4, arch_args=SMALL)
    whole, damaged = Run(study, "whole"), Run(study, "damaged")
    train_in(whole, config)
    # Two stops leave two checkpoints; the newer one is then damaged.
    for steps in (30, 30):
        with pytest.raises(RunInterrupted):
            train_in(damaged, config, stop_reason=stop_at(steps))
    path = getattr(damaged, which)
    path.write_bytes(path.read_bytes()[:1000])
    train_in(damaged, config)
    assert same(read_checkpoint(whole.last), read_checkpoint(damaged.last))
    assert same(read_checkpoint(whole.best), read_checkpoint(damaged.best))
    assert list(read_rows(whole.metrics_file)) == list(read_rows(damaged.metrics_file))


def test_a_payload_of_held_tensors_is_the_same(study: Path) -> None:
    trainer = make_trainer(study, TrainingConfig(epochs=2, arch_args=SMALL))
    trainer.train()
    state = trainer.state
    plain = state.payload()
    state.hold_tensors()
    assert state.held
    held = state.payload()
    assert held["model_state_dict"] is state.payload()["model_state_dict"]
    assert held.keys() == plain.keys()
    assert same(held, plain)
