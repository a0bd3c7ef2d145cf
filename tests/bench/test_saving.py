"""What saving costs: the step that it stalls, and the training as a whole."""

import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.data.dataset import FlowDataset
from flowjobs.field_values import KeyValues
from flowjobs.models.build import build_model
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training.saving import CheckpointSaver
from flowjobs.training.state import TrainState
from flowjobs.training.trainer import Trainer
from tests.bench.loops import stopping_after_an_epoch
from tests.bench.ratios import ratios_in_turns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# Some ten seconds of training.
EPOCHS, ROUNDS = (500, 1) if ON_GPU else (50, 3)

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


def a_large_state() -> dict[str, Any]:
    """About 150 MB: weights, average and both moments of 9 million parameters."""
    config = TrainingConfig(arch_args=KeyValues(width=1024, depth=4))
    model = build_model(config, 64).to(DEVICE)
    stats = {"mean": torch.zeros(64), "std": torch.ones(64)}
    state = TrainState(model, config, 100, stats, {})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    return state.payload()


def step_waits_until() -> float:
    """The time at which the next step would begin: on a GPU, that of the stream it is on."""
    if ON_GPU:
        torch.cuda.current_stream().synchronize()
    return time.perf_counter()


def test_a_save_stalls_training_for_a_part_of_a_plain_torch_save(tmp_path: Path) -> None:
    payload = a_large_state()
    saver = CheckpointSaver(tmp_path / "best.pt", tmp_path / "last.pt")
    stalls, plain, whole = [], [], []
    for _ in range(9):
        started = step_waits_until()
        saver.save(payload)
        stalls.append(step_waits_until() - started)
        saver._collect()
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        torch.save(payload, tmp_path / "plain.pt")
        plain.append(time.perf_counter() - started)
    saver.close()
    ratio = statistics.median(ours / theirs for ours, theirs in zip(stalls, plain, strict=True))
    print(
        f"\n{(tmp_path / 'plain.pt').stat().st_size / 1e6:.0f} MB: the step waits "
        f"{1e3 * statistics.median(stalls):.0f} ms, the disk has it after "
        f"{1e3 * statistics.median(whole):.0f} ms; torch.save takes "
        f"{1e3 * statistics.median(plain):.0f} ms: {ratio:.2f} of it"
    )
    assert ratio < 0.5


def train(study: Path, *, saving: bool) -> None:
    """Long enough for a save or two: the first one of a run comes after ten seconds, unless it is
    asked for.

    An epoch has a hundred steps: each one that is the best so far is copied at its end. The process
    stops itself as the first one has ended: the first checkpoint, which is loaded back, is a part
    of the start.
    """
    every_s = 1.0 if ON_GPU else None
    config = TrainingConfig(epochs=EPOCHS, patience=EPOCHS, lr=1e-4, checkpoint_every_s=every_s)
    run = Run(study, "saving" if saving else "not")
    for folder in (run.folder, run.checkpoints):
        shutil.rmtree(folder, ignore_errors=True)
    run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
    rows = torch.randn(7000, 64, generator=torch.Generator().manual_seed(0))
    train_dataset, val_dataset = FlowDataset(rows[:6400]), FlowDataset(rows[6400:])
    model = build_model(config, 64)
    with pytest.MonkeyPatch.context() as patch, recording(run, JobInfo.in_foreground()) as recorder:
        if not saving:
            patch.setattr(CheckpointSaver, "due", lambda saver, epoch_finished: False)
            patch.setattr(CheckpointSaver, "keep_best", lambda *given, **held: None)
            patch.setattr(CheckpointSaver, "save_and_wait", lambda *given, **named: None)
        trainer = Trainer(
            model, config, train_dataset, val_dataset, DEVICE, run=run, recorder=recorder
        )
        with stopping_after_an_epoch(recorder):
            trainer.train()


def test_saving_takes_one_percent_of_training_at_most(study: Path) -> None:
    saves, does_not = (
        [sys.executable, "-m", __name__, str(study), how] for how in ("saving", "not")
    )
    ratios = ratios_in_turns(saves, {"without saving": does_not}, rounds=ROUNDS)
    assert ratios["without saving"] >= 0.99


if __name__ == "__main__":
    train(Path(sys.argv[1]), saving=sys.argv[2] == "saving")
    os._exit(0)  # its end is not part of it
