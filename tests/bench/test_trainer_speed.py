"""The whole trainer against what a user would take instead: same model, data and steps."""

from pathlib import Path

import pytest

from flowjobs.config import TrainingConfig
from tests.bench.loops import command_of
from tests.bench.ratios import ratios_in_turns

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

# Of the speed of a bare loop, which saves nothing. A step takes as long in both; the rest is copies
# of each new best (1.6 % of a small U-Net's time), the last save, and the seed of each step.
OF_A_BARE_LOOP = 0.94


def test_the_trainer_is_as_fast_as_a_tuned_loop(study: Path) -> None:
    pytest.importorskip("lightning")
    config = TrainingConfig(epochs=80, patience=1000)
    ours, tuned, dataloader, lightning = (
        command_of(loop, config, study)
        for loop in ("flowjobs_loop", "tuned_loop", "dataloader_loop", "lightning_loop")
    )
    others = {"tuned bare loop": tuned, "DataLoader loop": dataloader, "Lightning": lightning}
    ratios = ratios_in_turns(ours, others, rounds=5)
    assert ratios["tuned bare loop"] >= OF_A_BARE_LOOP
    assert ratios["DataLoader loop"] >= 1.3
    assert ratios["Lightning"] >= 1.6


@pytest.mark.parametrize(("arch", "epochs"), [("unet", 80), ("dit", 40)])
def test_so_it_is_with_each_architecture(study: Path, arch: str, epochs: int) -> None:
    config = TrainingConfig(arch=arch, epochs=epochs, patience=1000)
    ours, tuned = (command_of(loop, config, study) for loop in ("flowjobs_loop", "tuned_loop"))
    ratios = ratios_in_turns(ours, {"tuned bare loop": tuned}, rounds=7)
    assert ratios["tuned bare loop"] >= OF_A_BARE_LOOP
