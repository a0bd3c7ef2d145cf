"""Steps that are replayed as a CUDA graph end with the bits of plain ones, also in parts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowjobs.errors import RunInterrupted
from flowjobs.field_values import KeyValues
from flowjobs.runs.run import Run
from tests.gpu.runs import (
    CONFIG,
    assert_interrupted,
    assert_same_bits,
    train,
    train_in_three_ways,
    with_source,
)

pytestmark = pytest.mark.gpu

DROPOUT = KeyValues(dropout=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"arch": "mlp", "arch_args": DROPOUT},
        {"arch": "unet", "arch_args": DROPOUT},
        {"arch": "dit", "arch_args": DROPOUT},
        {"arch": "dit", "precision": "bf16", "arch_args": DROPOUT},
        {"flow": "icfm", "sigma": 0.1, "time_sampling": "logit-normal"},
        {"flow": "otcfm", "ot_batch": 64},
        {"flow": "sbcfm", "sigma": 0.5},
        {"aug": "noise"},
        {"aug": "mixup"},
        {"aug": "dropout"},
        {"source": "rows.pt"},
        {"data_placement": "loader"},
        {"checkpoint_every_s": 0.0, "weight_decay": 0.0, "grad_clip": 0.1},
    ],
    ids=str,
)
def test_captured_and_plain_whole_and_in_parts_all_end_with_the_same_bits(
    study: Path, device: torch.device, options: dict[str, Any]
) -> None:
    config = replace(CONFIG, deterministic=True, **with_source(options))
    assert train_in_three_ways(study, config, device).captured


def test_a_run_may_change_between_captured_and_plain_steps(
    study: Path, device: torch.device
) -> None:
    config = replace(CONFIG, deterministic=True, arch_args=DROPOUT)
    whole = Run(study, "whole")
    train(whole, config, device)
    for first in (True, False):
        run = Run(study, f"first-{first}")
        with pytest.raises(RunInterrupted):
            train(run, replace(config, cuda_graph=first), device, leave_at=(35,))
        train(run, replace(config, cuda_graph=not first), device)
        assert_interrupted(run, 1)
        assert_same_bits(whole, run)
