"""The daemon of MPS, in whose place a script stands: what is asked of it, and where it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.jobs import mps
from flowjobs.runs.run import Run
from flowjobs.slots import SLOTS

# One whose run is told of a fault on the GPU that is not its own.
MODEL = """
import torch

class Told(torch.nn.Linear):
    def __init__(self, dim):
        super().__init__(dim, dim)

    def forward(self, x, t):
        raise RuntimeError("CUDA error: device-side assert triggered")
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It notes what it is asked, starts where there is no file "broken", and logs a line."""
    control = tmp_path / "bin/nvidia-cuda-mps-control"
    control.parent.mkdir()
    control.write_text(
        '#!/bin/sh\necho "$1$(cat)" "$CUDA_MPS_PIPE_DIRECTORY" >> "$0.calls"\n'
        'echo "Failed to start" >> "$CUDA_MPS_LOG_DIRECTORY/control.log"\n'
        '! [ -e "$0.broken" ] || exit 1\n'
    )
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{control.parent}:{os.environ['PATH']}")
    return control


def folder_of(control: Path) -> Path:
    """The daemon's, once it was told to start and to quit."""
    start, *quit_, folder = Path(f"{control}.calls").read_text().split()[1:6]
    assert [*quit_, folder] == ["quit", "-t", "5", start]
    return Path(folder)


def test_a_daemon_that_does_not_start_is_told_to_quit_and_leaves_nothing(control: Path) -> None:
    Path(f"{control}.broken").touch()
    with pytest.raises(ConfigError, match="exit code 1"), mps.mps_daemon():
        pass
    assert not folder_of(control).exists()


def test_a_daemon_by_which_nothing_computes_is_none(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As its client does where the server cannot start.
    monkeypatch.setattr(mps, "CLIENT", "import sys; sys.exit('CUDA error 805')")
    with pytest.raises(ConfigError, match="CUDA error 805; Failed to start"), mps.mps_daemon():
        pass
    assert not folder_of(control).exists()
    monkeypatch.setattr(mps, "CLIENT", "")
    with mps.mps_daemon() as variables:
        assert Path(variables["CUDA_MPS_PIPE_DIRECTORY"]).exists()
        assert variables["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_fault_that_may_be_another_runs_is_told_as_such(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("told.py").write_text(MODEL)
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv(mps.PIPE_FOLDER, str(study / "nothing"))
    monkeypatch.setenv(SLOTS, "2")
    run = Run(study, "told")
    training = TrainingConfig(arch="told:Told")
    run.create(
        RunConfig(training, SlurmConfig(gpus_per_node=0), TrackingConfig(wandb_mode="disabled"))
    )
    command = [sys.executable, "-m", "flowjobs.jobs", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    status = run.status()
    assert (status.state, status.attempts[-1].kind) == ("failed", "lost GPU"), done.stderr
    assert status.reason.startswith("by MPS, which tells all runs of a fault of one on the GPU")
    assert "device-side assert" in status.reason
    assert "told.py" in status.traceback
