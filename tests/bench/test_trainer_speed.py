"""The whole trainer against what a user would take instead: same model, data and steps."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flowjobs.config import TrainingConfig
from tests.bench import loops
from tests.bench.ratios import paired_ratios

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def one_thread_each() -> Iterator[None]:
    """As a run of this size takes by itself. With all cores our saving shares them: 0.01 less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def silent(loop: Callable[..., None], config: TrainingConfig, study: Path) -> Callable[[], None]:
    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loop(config, study, DEVICE)

    return run


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_is_as_fast_as_a_tuned_loop(study: Path) -> None:
    pytest.importorskip("lightning")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    config = TrainingConfig(patience=1000)
    others = {
        "tuned bare loop": loops.tuned_loop,
        "DataLoader loop": loops.dataloader_loop,
        "Lightning": loops.lightning_loop,
    }
    ratios = paired_ratios(
        silent(loops.flowjobs_loop, config, study),
        {name: silent(loop, config, study) for name, loop in others.items()},
        rounds=3,
    )
    assert ratios["tuned bare loop"] >= 0.97
    assert ratios["DataLoader loop"] >= 1.3
    assert ratios["Lightning"] >= 1.6


# As many epochs as make the start, which takes 0.2 s more with its first checkpoint, a small part.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arch", "epochs"), [("unet", 200), ("dit", 60)])
def test_so_it_is_with_each_architecture(study: Path, arch: str, epochs: int) -> None:
    config = TrainingConfig(arch=arch, epochs=epochs, patience=1000)
    ratios = paired_ratios(
        silent(loops.flowjobs_loop, config, study),
        {"tuned bare loop": silent(loops.tuned_loop, config, study)},
        rounds=3,
    )
    assert ratios["tuned bare loop"] >= 0.97
