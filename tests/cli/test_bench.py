"""`flowjobs bench`: what so many runs train together, and those that cannot."""

import json
from pathlib import Path

import pytest

from tests.conftest import Command

# Of two at once, neither finds room.
MODEL = """
import os
from torch import nn
class Narrow(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.layer = nn.Linear(dim, dim)
    def forward(self, x, t):
        if self.training and os.environ["FLOWJOBS_SLOTS"] == "2":
            raise MemoryError("no room for two")
        return self.layer(x)
"""


@pytest.mark.long
def test_what_runs_train_together_is_measured_until_they_cannot(
    flowjobs: Command, study: Path
) -> None:
    Path("narrow.py").write_text(MODEL)
    model = ("--arch", "narrow:Narrow", "--flow", "icfm")
    done = flowjobs("bench", *model, "--runs-per-gpu", "2", "1", "--seconds", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one, two = found["measured"]
    assert (one["runs"], two["runs"], found["advised"]) == (1, 2, 1)
    assert one["samples_per_s"] > 0
    assert two["samples_per_s"] == 0
    assert two["why"].endswith("no room for two")
    none = flowjobs("bench", *model, "--mps")
    assert (none.returncode, "nvidia-cuda-mps-control is not on PATH" in none.stderr) == (2, True)
    assert not study.exists()
