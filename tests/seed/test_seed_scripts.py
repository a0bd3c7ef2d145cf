"""The seed's three check scripts pass, with only the names of modules changed.

They ask for a dataset `1k` of width 1024 and for a model called `resume-test`; a user has the one
in the study and the other in flowjobs.toml, and so has the test.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from flowjobs.data.dataset import FlowDataset, load_digits, write_splits
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint

SCRIPTS = Path(__file__).parent


def run_script(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "WANDB_MODE": "offline"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_1k_of_width_1024(study: Path) -> None:
    digits = load_digits()
    directions = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    write_splits(FlowDataset(digits @ directions), study, {"1k": 1000})


def test_checkpoint_utilities(workplace: Path) -> None:
    assert "Checkpoint utilities OK" in run_script("checkpoint_utilities.py")


def test_wandb_integration(study: Path) -> None:
    write_1k_of_width_1024(study)
    said = run_script("wandb_integration.py")
    assert "Trained 2 epochs" in said
    assert "Checkpoint saved" in said
    assert "Wandb integration OK" in said
    run = Run(study, "test-icfm-1k-none")
    assert list((run.folder / "wandb").glob("offline-run-*/*.wandb"))


def test_resume_support(study: Path, workplace: Path) -> None:
    write_1k_of_width_1024(study)
    (workplace / "models.py").write_text(
        (SCRIPTS / "wandb_integration.py").read_text().partition("# Load small dataset")[0]
    )
    (workplace / "flowjobs.toml").write_text('[arch]\nresume-test = "models:SimpleVelocityNet"\n')
    said = run_script("resume_support.py")
    assert "STDERR" not in said
    assert "Resume support OK" in said
    # "Epoch counter continues correctly": two epochs of 15 steps before, two after.
    run = Run(study, "resume-test-icfm-1k-none")
    status = run.status()
    assert [attempt.last_step for attempt in status.attempts] == [30, 60]
    assert read_checkpoint(run.last)["scheduler_state_dict"]["last_epoch"] == 60
    steps = [row["step"] for row in read_rows(run.metrics_file)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 60
