"""Each built-in model trains at the default learning rate, on vectors as narrow and wide as ours.

None diverges, and each predicts better than the mean velocity soon. Of the wide data,
stand_ins.py says what they are.
"""

from pathlib import Path

import pytest
import torch

from flowjobs.config import BUILT_IN_ARCHS, TrainingConfig
from flowjobs.data.dataset import FlowDataset, load_datasets, split
from flowjobs.models.build import build_model
from flowjobs.training import FlowTrainer
from tests.data.stand_ins import mixture, pushed

BATCH = 16


def loss_against_mean_velocity(
    arch: str, train: FlowDataset, val: FlowDataset, steps: int
) -> float:
    """The validation loss as a part of what predicting the mean velocity scores.

    With the default rate, warm-up, clipping and average; the batch is small, which is harder.
    """
    epochs = max(1, steps // (len(train) // BATCH))
    config = TrainingConfig(arch=arch, epochs=epochs, batch_size=BATCH)
    model = build_model(config, train.shape)
    result = FlowTrainer(model, config, train, val, "cpu", name=arch).train()  # or it has diverged
    mean, std = train.data.mean(0), train.data.std(0)
    normalized = (val.data - mean) / torch.where(std > 0, std, 1.0)
    return result["best_val_loss"] / float(1 + normalized.var(0).mean())


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.mark.parametrize("arch", BUILT_IN_ARCHS)
def test_on_digits(study: Path, arch: str) -> None:
    train, val = load_datasets("digits", study)
    part = FlowDataset(train.data[:800])
    assert loss_against_mean_velocity(arch, part, val, steps=150) < 0.9


@pytest.mark.long
@pytest.mark.parametrize("make", [mixture, pushed])
@pytest.mark.parametrize("dim", [256, 1024])
@pytest.mark.parametrize("arch", BUILT_IN_ARCHS)
def test_on_what_stands_in_for_embeddings(study: Path, arch: str, dim: int, make: object) -> None:
    assert callable(make)
    parts = split(FlowDataset(make(dim)))
    assert loss_against_mean_velocity(arch, *parts, steps=400) < 0.9
