"""What a user would write or take instead of our trainer: the same model, data and steps.

Each loop trains the model of a config on its data with AdamW, gradient clipping, warm-up and
cosine, an average of the weights, and a validation with it after every epoch.

`python -m tests.bench.loops LOOP CONFIG STUDY`, as `command_of` has it, runs one, and stops itself
as the first epoch has ended, where its time begins, so that samples a second are compared: what a
start takes, test_start.py and test_interruption.py measure.
"""

import copy
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.data.dataset import load_datasets, normalization_stats
from flowjobs.models.build import build_model
from flowjobs.runs.recorder import Recorder, recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training import get_cosine_schedule_with_warmup, saving
from flowjobs.training.trainer import Trainer

DECAY = 0.999
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Watch:
    """What a loop tells how far it is."""

    def stepped(self) -> None:
        """After each step."""

    def epoch_ended(self) -> None:
        """After each validation."""


def command_of(loop: str, config: TrainingConfig, study: Path) -> list[str]:
    """The command that runs a loop."""
    return [sys.executable, "-m", __name__, loop, json.dumps(config.to_dict()), str(study)]


@cache  # each process of a loop stops itself once
def epoch_has_ended() -> None:
    """Stop this process at the end of its first epoch, until it is continued."""
    os.kill(os.getpid(), signal.SIGSTOP)


class StopsAfterAnEpoch(Watch):
    """For turns: see `epoch_has_ended`."""

    def epoch_ended(self) -> None:
        epoch_has_ended()


def normalized_rows(
    config: TrainingConfig, study: Path, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Training and validation rows, normalized, on the device."""
    train, val = load_datasets(config.dataset, study)
    stats = normalization_stats(train)
    parts = ((part.data - stats["mean"]) / stats["std"] for part in (train, val))
    train_rows, val_rows = (part.to(device) for part in parts)
    return train_rows, val_rows


def flow_loss(model: nn.Module, x_1: Tensor) -> Tensor:
    """The flow-matching loss of independent coupling."""
    x_0 = torch.randn_like(x_1)
    t = torch.rand(len(x_1), 1, device=x_1.device)
    x_t = x_0 + t * (x_1 - x_0)
    return nn.functional.mse_loss(model(x_t, t.squeeze(-1)), x_1 - x_0)


@contextmanager
def stopping_after_an_epoch(recorder: Recorder) -> Iterator[None]:
    """What is trained in the block stops this process as its first epoch has ended.

    Of the time between two saves it runs a part: they come as often as if it ran all of it.
    """
    share = saving.COST_SHARE / int(os.environ.get("IN_TURNS", "1"))
    record = recorder.record

    def recorded(row: Mapping[str, Any]) -> None:
        record(row)
        if "val/loss" in row:
            epoch_has_ended()

    with (
        mock.patch.object(recorder, "record", recorded),
        mock.patch.object(saving, "COST_SHARE", share),
    ):
        yield


def flowjobs_loop(config: TrainingConfig, study: Path, device: torch.device, watch: Watch) -> None:
    """Our trainer with all that it does but W&B: record, progress, checkpoints, exact resume."""
    run = Run(study, "bench")
    for folder in (run.folder, run.checkpoints):
        shutil.rmtree(folder, ignore_errors=True)  # or it would go on from where it was
    run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
    train, val = load_datasets(config.dataset, study)
    model = build_model(config, train.shape)
    with recording(run, JobInfo.in_foreground()) as recorder:
        trainer = Trainer(model, config, train, val, device, run=run, recorder=recorder)
        with stopping_after_an_epoch(recorder):
            assert trainer.train()["epochs_run"] == config.epochs
    status = run.status()
    assert status.attempts[0].first_step == 0, "the steps were not taken here"


def tuned_loop(config: TrainingConfig, study: Path, device: torch.device, watch: Watch) -> None:
    """A bare loop by someone who knows torch: resident data, fused optimizer, foreach EMA."""
    train, val = normalized_rows(config, study, device)
    model = build_model(config, train.shape[1]).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    weights, averaged = list(model.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(weights, lr=config.lr, fused=True)
    steps = config.epochs * (len(train) // config.batch_size)
    scheduler = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, steps)
    for _ in range(config.epochs):
        order = torch.randperm(len(train), device=device)
        for start in range(0, len(train) - config.batch_size + 1, config.batch_size):
            loss = flow_loss(model, train[order[start : start + config.batch_size]])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, config.grad_clip)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, weights, 1 - DECAY)
            watch.stepped()
        with torch.no_grad():
            flow_loss(ema, val).item()
        watch.epoch_ended()


def dataloader_loop(
    config: TrainingConfig, study: Path, device: torch.device, watch: Watch
) -> None:
    """A loop as tutorials have it: DataLoader, default optimizer, EMA parameter by parameter."""
    train, val = normalized_rows(config, study, torch.device("cpu"))
    loader = DataLoader(TensorDataset(train), config.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(TensorDataset(val), config.batch_size)
    model = build_model(config, train.shape[1]).to(device)
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    steps = config.epochs * len(loader)
    scheduler = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, steps)
    for _ in range(config.epochs):
        for (rows,) in loader:
            loss = flow_loss(model, rows.to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
                    average.mul_(DECAY).add_(weight, alpha=1 - DECAY)
            watch.stepped()
        with torch.no_grad():
            for (rows,) in val_loader:
                flow_loss(ema, rows.to(device)).item()
        watch.epoch_ended()


def lightning_loop(config: TrainingConfig, study: Path, device: torch.device, watch: Watch) -> None:
    """Lightning by its documentation: logger, checkpoints of best and last, EMA callback."""
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    train, val = normalized_rows(config, study, torch.device("cpu"))
    loader = DataLoader(TensorDataset(train), config.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(TensorDataset(val), config.batch_size)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(config, train.shape[1])

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = flow_loss(self.model, batch[0])
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.log("val/loss", flow_loss(self.model, batch[0]))

        def on_train_batch_end(self, *given: object) -> None:
            watch.stepped()

        def on_validation_epoch_end(self) -> None:
            watch.epoch_ended()

        def configure_optimizers(self) -> object:
            optimizer = torch.optim.AdamW(self.parameters(), lr=config.lr)
            steps = config.epochs * len(loader)
            scheduler = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    trainer = lightning.Trainer(
        max_epochs=config.epochs,
        accelerator=device.type,
        devices=1,
        gradient_clip_val=config.grad_clip,
        log_every_n_steps=10,
        logger=CSVLogger(study / "lightning"),
        callbacks=[
            ModelCheckpoint(study / "lightning", monitor="val/loss", save_last=True),
            EMAWeightAveraging(decay=DECAY),
        ],
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader, val_loader)


if __name__ == "__main__":
    LOOPS = {
        loop.__name__: loop for loop in (flowjobs_loop, tuned_loop, dataloader_loop, lightning_loop)
    }
    config = TrainingConfig(**json.loads(sys.argv[2]))
    LOOPS[sys.argv[1]](config, Path(sys.argv[3]), DEVICE, StopsAfterAnEpoch())
    os._exit(0)  # its end is not part of it
