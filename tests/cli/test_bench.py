"""`flowjobs bench`: what so many runs train together, and those that cannot."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowjobs.cli.bench import _without_pairs_to_make
from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.jobs.side_by_side import _link_data
from flowjobs.runs.datasets import pair_files, split_files
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
    # What is not made yet, the digits and the pairs, is not made in the study either.
    small = ("--arch", "mlp", "--width", "16")
    teacher = ("--flow", "icfm", "--epochs", "1", "--no-evaluate", "--wandb-mode", "disabled")
    assert flowjobs("train", *small, *teacher, "--name", "a").returncode == 0
    files = sorted(study.rglob("*"))
    straight = ("--flow", "reflow", "--reflow-from", "a", "--runs-per-gpu", "1", "--seconds", "0.5")
    done = flowjobs("bench", *small, *straight)
    assert (done.returncode, "the pairs of a are not made yet: icfm" in done.stderr) == (0, True)
    assert sorted(study.rglob("*")) == files


def test_runs_of_ones_own_file_are_measured(flowjobs: Command, workplace: Path) -> None:
    np.save("rows.npy", np.random.default_rng(0).standard_normal((200, 8), dtype=np.float32))
    model = ("--width", "16", "--dataset", "rows.npy", "--batch-size", "500")
    done = flowjobs("bench", *model, "--runs-per-gpu", "1", "--seconds", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["measured"]
    assert (one["why"], one["samples_per_s"] > 0) == ("", True)


def test_data_are_linked_file_by_file_and_pairs_that_are_not_made_are_not_waited_for(
    study: Path, tmp_path: Path
) -> None:
    pinned = f"a@sha256:{'0' * 64}"
    training = TrainingConfig(flow="reflow", reflow_from=pinned, dataset="5k")
    instead = _without_pairs_to_make(training, study)
    assert instead == TrainingConfig(flow="icfm", dataset="5k")
    own = replace(training, flow="mine:flow")
    with pytest.raises(ConfigError, match="the pairs of a are not made yet, and without them"):
        _without_pairs_to_make(own, study)
    for file in (*pair_files(study, pinned), *split_files(study, "5k")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(file))
    for config in (training, own):
        assert _without_pairs_to_make(config, study) == config
    there = tmp_path / "there"
    _link_data(training, study, there)
    for file in (*pair_files(there, pinned), *split_files(there, "5k")):
        assert file.read_text() == str(study / file.relative_to(there))
    assert not any(folder.is_symlink() for folder in there.rglob("*") if folder.is_dir())
