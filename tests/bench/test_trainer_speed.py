"""The whole trainer against what a user would take instead: same model, data and steps."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowjobs.config import TrainingConfig
from tests.bench import loops
from tests.bench.ratios import paired_ratios

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = [
    pytest.mark.bench,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("one_thread"),
]


def silent(loop: Callable[..., float], config: TrainingConfig, study: Path) -> Callable[[], float]:
    def run() -> float:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return loop(config, study, DEVICE)

    return run


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_is_as_fast_as_a_tuned_loop(study: Path) -> None:
    pytest.importorskip("lightning")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    config = TrainingConfig(epochs=80, patience=1000)
    others = {
        "tuned bare loop": loops.tuned_loop,
        "DataLoader loop": loops.dataloader_loop,
        "Lightning": loops.lightning_loop,
    }
    ratios = paired_ratios(
        silent(loops.flowjobs_loop, config, study),
        {name: silent(loop, config, study) for name, loop in others.items()},
        rounds=5,
    )
    assert ratios["tuned bare loop"] >= 0.97
    assert ratios["DataLoader loop"] >= 1.3
    assert ratios["Lightning"] >= 1.6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arch", "epochs"), [("unet", 80), ("dit", 40)])
def test_so_it_is_with_each_architecture(study: Path, arch: str, epochs: int) -> None:
    config = TrainingConfig(arch=arch, epochs=epochs, patience=1000)
    ratios = paired_ratios(
        silent(loops.flowjobs_loop, config, study),
        {"tuned bare loop": silent(loops.tuned_loop, config, study)},
        rounds=5,
    )
    assert ratios["tuned bare loop"] >= 0.97
