import json
import math
from pathlib import Path

import pytest
import torch

from flowjobs.training.checkpoint import read_checkpoint, write_checkpoint
from tests.conftest import Command


def test_inspect_says_what_is_in_a_checkpoint(flowjobs: Command, workplace: Path) -> None:
    model = ("--arch-args", "width=16", "depth=1")
    flowjobs("train", "--epochs", "1", *model, "--wandb-mode", "disabled")
    path = "study/checkpoints/mlp-icfm-digits-none/last.pt"
    found = json.loads(flowjobs("checkpoint", "inspect", path, "--json").stdout)
    assert (found["step"], found["epochs_finished"], found["data_width"]) == (23, 1, 64)
    assert found["data_shape"] == [64]
    assert found["config"]["arch_args"] == {"width": 16, "depth": 1}
    assert found["model"]["linear_in.weight"] == "(16, 64) float32"
    assert "linear_in.weight" in flowjobs("checkpoint", "inspect", path).stdout
    # One that was saved before the first validation, of rows that are no vectors.
    stats = {key: torch.zeros(3, 32, 32) for key in ("mean", "std")}
    changed = {"best_loss": math.inf, "normalization_stats": stats}
    payload = read_checkpoint(Path(path)) | changed
    # And with what a model keeps beside its tensors.
    payload["model_state_dict"]["_extra_state"] = {"calls": 3}
    write_checkpoint(Path("early.pt"), payload)
    shown = flowjobs("checkpoint", "inspect", "early.pt", "--json").stdout
    early = json.loads(shown, parse_constant=pytest.fail)
    assert early["best_loss"] is None
    assert (early["data_width"], early["data_shape"]) == (3072, [3, 32, 32])
    assert early["model"] == found["model"] | {"_extra_state": "dict"}
    assert early["elements"] == found["elements"]


def test_inspect_refuses_a_damaged_file(flowjobs: Command, workplace: Path) -> None:
    Path("torn.pt").write_bytes(b"PK\x03\x04")
    done = flowjobs("checkpoint", "inspect", "torn.pt")
    assert done.returncode == 2
    assert "torn.pt (4 bytes) has no digest at its end" in done.stderr
    assert "Traceback" not in done.stderr
    assert Path("torn.pt").exists()
