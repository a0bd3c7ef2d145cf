"""Data that are no vectors, with a model of one's own: from the file to the measures."""

import json
import math
from pathlib import Path

import numpy as np

from flowjobs.cli.main import run as command
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint
from tests.conftest import Command

CONV = """
import torch
from torch import nn

class Conv(nn.Module):
    def __init__(self, shape, width=8):
        super().__init__()
        channels, *_ = shape
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, t):
        time = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.last(torch.relu(self.first(torch.cat([x, time], dim=1))))
"""


def test_a_model_of_ones_own_gets_data_of_any_shape(
    flowjobs: Command, workplace: Path, study: Path
) -> None:
    (workplace / "nets.py").write_text(CONV)
    pictures = np.random.default_rng(0).random((120, 3, 8, 8), dtype=np.float32)
    np.save("pictures.npy", pictures)
    options = (
        *("--arch", "nets:Conv", "--params", "1k", "--dataset", "pictures.npy", "--name", "a"),
        *("--batch-size", "16", "--wandb-mode", "disabled", "--cluster", "local"),
    )
    for epochs in ("1", "2"):  # the second time it is resumed
        done = flowjobs("submit", *options, "--epochs", epochs)
        assert done.returncode == 0, done.stdout + done.stderr
    run = Run(study, "a")
    status, last = run.status(), read_checkpoint(run.last)
    assert [attempt.first_step for attempt in status.attempts] == [0, 6]
    assert status.parameters == sum(part.numel() for part in last["model_state_dict"].values())
    assert math.isclose(status.parameters, 1000, rel_tol=0.05)
    assert last["normalization_stats"]["mean"].shape == (3, 8, 8)
    at_its_end = json.loads(run.evaluation_file.read_text())["measures"]
    assert run.samples_picture.exists()

    # In this process, which has loaded torch.
    assert command(["sample", "a", "-n", "5", "--steps", "4", "--out", "x.npy", "x.png"]) == 0
    drawn = np.load("x.npy")
    assert (drawn.shape, bool(np.isfinite(drawn).all())) == ((5, 3, 8, 8), True)
    assert command(["evaluate", "a", "--repeats", "1", "--steps", "4"]) == 0
    assert json.loads(run.evaluation_file.read_text())["measures"].keys() >= at_its_end.keys()
