"""What cannot be resumed is said at the first save, and what is not finite is never kept."""

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowjobs.config import TrainingConfig
from flowjobs.errors import (
    CheckpointError,
    CheckpointGoneError,
    CheckpointMismatchError,
    CheckpointUnloadableError,
    RunInterrupted,
    TrainingDivergedError,
)
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.training import saving
from flowjobs.training.checkpoint import previous_of, read_checkpoint, write_checkpoint
from flowjobs.training.seal import digest_of
from flowjobs.training.state import TrainState, first_not_finite
from tests.training.same import same
from tests.training.test_trainer import SMALL, make_trainer, stop_at, train_in

CONFIG = TrainingConfig(epochs=3, arch_args=SMALL)


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


class Counter:
    """An object of the user's."""

    def __init__(self) -> None:
        self.calls = 0


class Model(nn.Module):
    """A linear one that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


class KeepsNumbers(Model):
    """What may be kept: plain values and tensors, of another type and shape each time."""

    def get_extra_state(self) -> Any:
        if self.calls == 0:
            return None
        return {"calls": self.calls, "of": [torch.zeros(self.calls), {"x"}], "at": (1, 2.0, "y")}

    def set_extra_state(self, state: Any) -> None:
        self.calls = 0 if state is None else state["calls"]


class KeepsAnObject(Model):
    def get_extra_state(self) -> Any:
        return {"counter": Counter()}

    def set_extra_state(self, state: Any) -> None:
        pass


class KeepsAPath(KeepsAnObject):
    def get_extra_state(self) -> Any:
        return [Path("cache")]


class KeepsAFunction(KeepsAnObject):
    def get_extra_state(self) -> Any:
        return lambda: None


class TakesNothingBack(Model):
    def get_extra_state(self) -> Any:
        return 1


class RegistersLate(Model):
    """As a restart builds it, it has no place for what it saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.cache = torch.zeros(3)
        return super().forward(x, t)


class ChangesType(Model):
    """As a restart builds it, its buffer is of a type that cannot hold what it saved."""

    def __init__(self, built: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1) if built is None else built)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean()
        return super().forward(x, t) / self.scale


class TurnsSparse(Model):
    """Its copies would take what it saved, but not the model that a restart builds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.zeros(2, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.graph = torch.eye(2).to_sparse()
        return super().forward(x, t)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (KeepsAnObject, r"holds a tests.*Counter \(model_state_dict._extra_state.counter\)"),
        (KeepsAPath, r"holds a pathlib.PosixPath \(model_state_dict._extra_state.0\)"),
        (KeepsAFunction, "holds a builtins.function"),
        (TakesNothingBack, "does not take back the state that it gave.*_extra_state"),
        (RegistersLate, r"\(cache: \(3,\) there, absent here\)"),
        (ChangesType, r"\(scale: torch.float32 there, an integer type here\).*torch.tensor\(1.0\)"),
        (TurnsSparse, r"\(graph: torch.float32 torch.sparse_coo there, torch.float32 here\)"),
    ],
)
def test_a_model_that_could_not_be_resumed_is_refused_after_its_first_step(
    study: Path, model: Callable[[], nn.Module], said: str
) -> None:
    run = Run(study, "run")
    with pytest.raises(CheckpointUnloadableError, match=f"(?s)could not be resumed.*{said}"):
        train_in(run, CONFIG, model=model())
    assert list(run.checkpoints.iterdir()) == []
    assert not run.started()  # the name is free for the model that is mended


def test_a_run_of_before_types_were_looked_at_goes_on(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(study, "run")
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, model=ChangesType(torch.tensor(1.0)), stop_reason=stop_at(23))
    # It is still to be validated: it is also saved before a step has changed the type.
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, model=ChangesType(), stop_reason=stop_at(0))
    train_in(run, CONFIG, model=ChangesType())
    said = r"last.pt has other types .* \(scale: torch.float32 there, an integer type here\)"
    assert re.search(said, caplog.text)
    assert read_checkpoint(run.last)["ema_shadow"]["scale"].dtype is torch.float32


class Color(Enum):
    """A type of the user's."""

    RED = 1


WITH_ATTRIBUTE: OrderedDict[str, int] = OrderedDict()
vars(WITH_ATTRIBUTE).update(file=Path("cache"))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (Counter(), r"Counter \(model_state_dict._extra_state\)"),
        ({"used": {np.int64(7): 1}}, r"numpy.int64 \(a key of model_state_dict._extra_state.used"),
        (WITH_ATTRIBUTE, r"PosixPath \(an attribute of model_state_dict._extra_state.file\)"),
        ({(1, Color.RED): 0}, r"Color \(a key of model_state_dict._extra_state.1\)"),
    ],
)
def test_a_state_that_cannot_be_loaded_is_not_kept_later_either(
    study: Path, monkeypatch: pytest.MonkeyPatch, state: Any, said: str
) -> None:
    class Later(KeepsAnObject):
        def get_extra_state(self) -> Any:
            return state if self.calls > 25 else 0

    monkeypatch.setattr(saving, "FIRST_COST_S", math.inf)  # no save before it leaves but the first
    run = Run(study, "run")
    with pytest.raises(CheckpointUnloadableError, match=said):
        train_in(run, CONFIG, model=Later(), stop_reason=stop_at(40))
    assert read_checkpoint(run.last)["step"] == 1


def test_of_a_buffer_that_is_a_slice_the_slice_alone_is_saved(study: Path) -> None:
    run, model = Run(study, "run"), Model()
    model.register_buffer("anchors", torch.arange(300_000.0)[:8])
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, model=model, stop_reason=stop_at(1))
    assert run.last.stat().st_size < 300_000
    assert read_checkpoint(run.last)["ema_shadow"]["anchors"].tolist() == [*range(8)]


def test_extra_state_of_plain_values_comes_back(study: Path) -> None:
    whole, parts = Run(study, "whole"), Run(study, "parts")
    train_in(whole, CONFIG, model=KeepsNumbers())
    with pytest.raises(RunInterrupted):
        train_in(parts, CONFIG, model=KeepsNumbers(), stop_reason=stop_at(30))
    train_in(parts, CONFIG, model=KeepsNumbers())
    assert read_checkpoint(parts.last)["model_state_dict"]["_extra_state"]["calls"] == 69
    assert same(read_checkpoint(whole.last), read_checkpoint(parts.last))


class TurnsOlder(nn.Linear):
    """Since its version 2 the weight is kept transposed; that of older files is turned."""

    _version = 2

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # type: ignore[misc, no-untyped-call]


def test_a_module_that_has_versions_is_loaded_as_the_one_that_was_saved(study: Path) -> None:
    def model() -> nn.Module:
        whole = Model()
        whole.linear = TurnsOlder(64, 64)
        return whole

    run = Run(study, "run")
    config = replace(CONFIG, checkpoint_every_s=0.0)
    with pytest.raises(RunInterrupted):
        train_in(run, config, model=model(), stop_reason=stop_at(30))
    # Written of copies, beside the training, and of the state itself as the run left.
    for file in (run.best, run.last, previous_of(run.last)):
        weights = read_checkpoint(file)["ema_shadow"]
        there = weights["linear.weight"].clone()
        loaded = model()
        loaded.load_state_dict(weights)
        assert torch.equal(loaded.linear.weight, there), file


class KeepsAList(nn.Module):
    """A part that shifts by what it has kept, which no tensor of its state holds."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.kept.append(float(x.detach().mean()))
        return x + sum(self.kept)

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def test_the_average_is_of_what_the_model_keeps_beside_its_tensors(study: Path) -> None:
    def model() -> nn.Module:
        whole = Model()
        whole.linear = nn.Sequential(whole.linear, KeepsAList())
        return whole

    run, parts = Run(study, "run"), Run(study, "parts")
    train_in(run, CONFIG, model=model())
    for file in (run.last, run.best):
        payload = read_checkpoint(file)
        kept = payload["ema_shadow"]["linear.1._extra_state"]
        assert len(kept) == payload["step"]
        assert kept == payload["model_state_dict"]["linear.1._extra_state"]
    trainer = make_trainer(study, CONFIG, model=model(), run=run)
    trainer._restore()
    losses = [row["val/loss"] for row in read_rows(run.metrics_file) if "val/loss" in row]
    assert trainer._validation_loss() == losses[-1]
    with pytest.raises(RunInterrupted):
        train_in(parts, CONFIG, model=model(), stop_reason=stop_at(30))
    train_in(parts, CONFIG, model=model())
    assert same(read_checkpoint(run.last), read_checkpoint(parts.last))
    assert same(read_checkpoint(run.best), read_checkpoint(parts.best))


class Diverges(Model):
    """Its loss is not a number from the third step on; a mask of infinities is no harm."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4,), -math.inf))
        self.steps = steps

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity = super().forward(x, t)
        return velocity * math.nan if self.calls > self.steps else velocity


def test_a_state_that_is_not_finite_is_never_kept(study: Path) -> None:
    run = Run(study, "run")
    with pytest.raises(TrainingDivergedError, match=r"linear.weight is not finite at step 6,"):
        train_in(run, CONFIG, model=Diverges(3), stop_reason=stop_at(5))
    assert [file.name for file in run.checkpoints.iterdir()] == ["last.pt"]
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, model=Diverges(1000), stop_reason=stop_at(1))
    status = run.status()
    assert [attempt.first_step for attempt in status.attempts] == [0, 1]


def test_a_checkpoint_that_is_not_finite_is_set_aside(study: Path) -> None:
    run = Run(study, "run")
    for place in ("weights", "average", "moments"):
        for _ in range(2):
            with pytest.raises(RunInterrupted):
                train_in(run, CONFIG, stop_reason=stop_at(1))
        payload = read_checkpoint(run.last)
        tensors = {
            "weights": payload["model_state_dict"],
            "average": payload["ema_shadow"],
            "moments": payload["optimizer_state_dict"]["state"][0],
        }[place]
        name = "exp_avg_sq" if place == "moments" else next(iter(tensors))
        tensors[name].view(-1)[3] = math.inf
        write_checkpoint(run.last, payload)
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, stop_reason=stop_at(1))
    assert len(list(run.checkpoints.glob("last.nonfinite-*.pt"))) == 3
    status = run.status()
    assert [attempt.first_step for attempt in status.attempts] == [0, 2, 4, 6, 8, 10, 12]


def test_large_values_of_any_type_are_finite() -> None:
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    tensors = {str(dtype): torch.full((99,), 6e4, dtype=dtype) for dtype in types}
    tensors |= {"big": torch.full((99,), 3e38), "none": torch.zeros(0), "int": torch.ones(1).int()}
    assert first_not_finite(tensors) is None
    for name in (str(dtype) for dtype in types):
        broken = tensors[name].clone()
        broken[7] = math.nan
        assert first_not_finite({**tensors, name: broken}) == name


def test_without_last_pt_the_best_is_gone_on_from(study: Path) -> None:
    whole, run = Run(study, "whole"), Run(study, "run")
    train_in(whole, CONFIG)
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, stop_reason=stop_at(60))
    run.last.unlink()
    previous_of(run.last).unlink()
    train_in(run, CONFIG)
    status = run.status()
    assert [attempt.first_step for attempt in status.attempts] == [0, 46]
    assert same(read_checkpoint(whole.last), read_checkpoint(run.last))
    assert same(read_checkpoint(whole.best), read_checkpoint(run.best))
    assert list(read_rows(whole.metrics_file)) == list(read_rows(run.metrics_file))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("lose", [Path.unlink, cut_short])
def test_a_run_that_had_steps_never_starts_from_nothing(
    study: Path, lose: Callable[[Path], None]
) -> None:
    run = Run(study, "run")
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, stop_reason=stop_at(30))
    rows = run.metrics_file.read_bytes()
    for file in run.checkpoints.iterdir():
        lose(file)
    run.status_file.unlink()  # the rows say so too
    with pytest.raises(CheckpointGoneError, match=r"has trained 30 steps.*restore last") as said:
        train_in(run, CONFIG)
    assert said.value.exit_code == 2
    assert run.metrics_file.read_bytes() == rows


def test_a_best_of_lost_work_is_put_back(study: Path) -> None:
    """Killed between best.pt and last.pt, then other bits: what is reported is in best.pt."""
    run = Run(study, "run")
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, stop_reason=stop_at(30))
    before = read_checkpoint(run.best)
    lost = {**before, "step": 46, "best_loss": before["best_loss"] / 2}
    write_checkpoint(run.best, lost)
    train_in(run, CONFIG)
    status = run.status()
    assert status.best_val_loss == read_checkpoint(run.best)["best_loss"]


def test_a_best_that_is_gone_is_said(study: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(study, "run")
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, stop_reason=stop_at(50))
    before = read_checkpoint(run.best)["best_loss"]
    assert "is gone" not in caplog.text
    run.best.rename(previous_of(run.best))
    worse = {**read_checkpoint(previous_of(run.best)), "best_loss": before + 1}
    write_checkpoint(previous_of(run.best), worse)
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, stop_reason=stop_at(1))
    said = f"best.pt is gone, of loss {before:.4f}: the best is {before + 1:.4f} now, of the one"
    assert said in caplog.text
    assert same(read_checkpoint(run.best), worse)  # also where no better one comes
    run.best.unlink()
    train_in(run, CONFIG)
    assert f"best.pt is gone, of loss {before + 1:.4f}: the next epoch's is the bes" in caplog.text
    assert run.status().best_val_loss == read_checkpoint(run.best)["best_loss"]


def test_resume_goes_on_with_the_same_config_alone(study: Path) -> None:
    origin, run = Run(study, "origin"), Run(study, "run")
    with pytest.raises(RunInterrupted):
        train_in(origin, CONFIG, stop_reason=stop_at(1))
    other = TrainingConfig(epochs=4, lr=1e-6, batch_size=32, arch_args=SMALL)
    with pytest.raises(CheckpointMismatchError) as caught:
        train_in(run, other, resume_path=origin.last)
    said = str(caught.value)
    for part in ("--lr: 0.001 there, 1e-06 asked", "--batch-size: 64 there, 32 asked"):
        assert part in said
    assert f"--init-from {origin.last}" in said
    assert "--epochs" not in said
    assert not run.last.exists()
    with pytest.raises(CheckpointError, match="cannot be read"):
        train_in(origin, CONFIG, resume_path=Path("none.pt"))


def test_resume_refuses_a_file_that_does_not_say_all_of_its_config(study: Path) -> None:
    origin, run, file = Run(study, "origin"), Run(study, "run"), study / "own.pt"
    with pytest.raises(RunInterrupted):
        train_in(origin, CONFIG, stop_reason=stop_at(1))
    payload = read_checkpoint(origin.last)
    # Of what save_checkpoint is given by hand; that of the newer options may be missing.
    config = {key: of for key, of in payload["config"].items() if key not in ("lr", "seed")}
    write_checkpoint(file, {**payload, "config": config})
    says = rf"(?s)own.pt does not say its --lr, --seed: .*--init-from {file}"
    with pytest.raises(CheckpointMismatchError, match=says):
        train_in(run, CONFIG, resume_path=file)
    assert not run.saved_files()
    # One that resumed from it before it was refused.
    write_checkpoint(run.last, {**payload, "resumed_from": digest_of(file)})
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, resume_path=file, stop_reason=stop_at(1))
    assert read_checkpoint(run.last)["step"] == payload["step"] + 2
    payload["scheduler_state_dict"]["base_lrs"] = [1e-2]
    payload["optimizer_state_dict"]["param_groups"][0]["weight_decay"] = 0.5
    write_checkpoint(file, payload)
    says = r"(?s)own.pt is not .*--lr: 0.01 there, 0.001 asked.*--weight-decay: 0.5 there, 0.01 ask"
    with pytest.raises(CheckpointMismatchError, match=says):
        train_in(Run(study, "other"), CONFIG, resume_path=file)


def test_resume_refuses_a_longer_run_and_one_that_is_out_of_patience(study: Path) -> None:
    origin, run, file = Run(study, "origin"), Run(study, "run"), study / "own.pt"
    with pytest.raises(RunInterrupted):
        train_in(origin, CONFIG, stop_reason=stop_at(1))
    says = r"(?s)last.pt is of a run of 3 epochs.* --epochs 3 or more \(found 2\).*--init-from"
    with pytest.raises(CheckpointMismatchError, match=says):
        train_in(run, replace(CONFIG, epochs=2), resume_path=origin.last)
    payload = read_checkpoint(origin.last)
    write_checkpoint(file, payload | {"epochs_without_improvement": CONFIG.patience})
    says = r"own.pt has not improved for 50 epochs, and with --epochs 4 and --patience 50 would"
    with pytest.raises(CheckpointMismatchError, match=says):
        train_in(run, replace(CONFIG, epochs=4), resume_path=file)
    assert not run.saved_files()
    longer = replace(CONFIG, epochs=4, patience=51)
    with pytest.raises(RunInterrupted):
        train_in(run, longer, resume_path=file, stop_reason=stop_at(1))
    assert read_checkpoint(run.last)["step"] == payload["step"] + 2


def test_a_checkpoint_keeps_the_config_that_it_was_made_with(study: Path) -> None:
    run = Run(study, "run")
    with pytest.raises(RunInterrupted):
        train_in(run, CONFIG, stop_reason=stop_at(30))
    run.config_file.write_text(run.config_file.read_text().replace('"lr": 0.001', '"lr": 0.5'))
    edited = run.config().training
    assert edited.lr == 0.5
    files = {file: file.read_bytes() for file in run.checkpoints.iterdir()}
    with pytest.raises(CheckpointMismatchError, match=r"--lr: 0.001 there, 0.5 asked"):
        train_in(run, edited)
    assert {file: file.read_bytes() for file in run.checkpoints.iterdir()} == files


def test_initial_weights_are_all_that_is_taken_over(study: Path) -> None:
    origin, run = Run(study, "origin"), Run(study, "run")
    train_in(origin, TrainingConfig(epochs=1, arch_args=SMALL))
    config = TrainingConfig(epochs=1, lr=1e-5, seed=1, arch_args=SMALL, init_from=str(origin.best))
    trainer = make_trainer(study, config, run=run)
    run.logs.mkdir(parents=True)
    assert not trainer._restore()
    averaged = read_checkpoint(origin.best)["ema_shadow"]
    assert same(dict(trainer.state.model.state_dict()), dict(averaged))
    assert same(dict(trainer.state.ema.shadow), dict(averaged))
    assert (trainer.state.step, trainer.state.best_loss) == (0, math.inf)
    assert trainer.state.optimizer.state_dict()["state"] == {}
    assert trainer.state.scheduler.get_last_lr() == [1e-5 / 100]
    config = TrainingConfig(epochs=1, init_from=str(origin.best))
    said = "is of another model than the config asks.*give the --arch"
    with pytest.raises(CheckpointMismatchError, match=said) as caught:
        train_in(Run(study, "other"), config)
    assert "--name" not in str(caught.value)  # which is no way out


class Compiled(nn.Module):
    """What torch.compile returns, as far as its state shows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("there", [Model, lambda: Compiled(Model())])
@pytest.mark.parametrize("here", [Model, lambda: Compiled(Model())])
def test_initial_weights_are_those_of_a_compiled_model_too(
    there: Callable[[], nn.Module], here: Callable[[], nn.Module]
) -> None:
    stats = {"mean": torch.zeros(64), "std": torch.ones(64)}
    given, state = (TrainState(of(), CONFIG, 23, stats, {}) for of in (there, here))
    with torch.no_grad():
        for weights in given.ema.model.parameters():
            weights.add_(1)
    expected = [weights.clone() for weights in given.ema.model.parameters()]
    state.start_from_weights(given.payload(), Path("best.pt"))
    for model in (state.model, state.ema.model):
        assert same([*model.parameters()], expected)
