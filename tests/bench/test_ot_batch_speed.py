"""What pairing by optimal transport costs a step, its plans being solved beside the steps."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.data.dataset import load_datasets
from flowjobs.models.build import build_model
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training.trainer import Trainer
from tests.bench.ratios import paired_ratios

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


def training(study: Path, name: str, config: TrainingConfig) -> Callable[[], None]:
    def train() -> None:
        run = Run(study, name)
        for folder in (run.folder, run.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)  # or it would resume
        run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
        data = load_datasets(config.dataset, study)
        model = build_model(config, data[0].shape)
        with recording(run, JobInfo.in_foreground()) as recorder:
            trainer = Trainer(model, config, *data, DEVICE, run=run, recorder=recorder)
            trainer.train()

    return train


def test_plans_of_many_rows_are_hidden_behind_the_steps(study: Path) -> None:
    """One thread of torch's computes, so that of two cores one is left to the plans."""
    rows = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0))
    torch.save(rows, "rows.pt")
    common: Any = {"dataset": "rows.pt", "batch_size": 256, "epochs": 4, "width": 512, "depth": 4}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = paired_ratios(
            training(study, "otcfm", TrainingConfig(flow="otcfm", ot_batch=1024, **common)),
            {"icfm": training(study, "icfm", TrainingConfig(flow="icfm", **common))},
            rounds=5,
        )
    finally:
        torch.set_num_threads(threads)
    assert ratios["icfm"] >= 0.9
