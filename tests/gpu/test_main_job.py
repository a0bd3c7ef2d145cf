"""The job that a person submits, on a machine with a GPU and no Slurm: from start to samples."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from flowjobs.cli.main import run as command
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.gpu.runs import assert_same_bits, val_losses

pytestmark = pytest.mark.gpu


def test_one_command_trains_on_the_gpu_and_measures_samples(
    flowjobs: Command, study: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--arch", "mlp", "--flow", "icfm", "--epochs", "5", "--wandb-mode", "offline")
    done = flowjobs("submit", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run(study, "mlp-icfm-digits-none")
    status = run.status()
    assert status.state == "finished"
    (attempt,) = status.attempts
    assert attempt.job.cluster == "local"
    assert attempt.job.gpus  # the job has one of its own
    gpu = torch.cuda.get_device_name(device)
    for path in (run.best, run.last):
        assert read_checkpoint(path)["computed_with"]["device"] == gpu
    losses = val_losses(run)
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert run.samples_picture.exists()
    measures = json.loads(run.evaluation_file.read_text())["measures"]
    assert all(np.isfinite(measure["value"]) for measure in measures.values())
    assert list((run.folder / "wandb").glob("offline-run-*/*.wandb"))

    capsys.readouterr()
    assert command(["submit", *options]) == 0
    assert f"{run.name} is finished" in capsys.readouterr().out
    assert command(["sample", run.name, "-n", "40", "--device", "cuda", "--out", "x.npy"]) == 0
    assert np.isfinite(np.load("x.npy")).all()
    assert command(["sample", run.name, "-n", "40", "--device", "cpu", "--out", "y.npy"]) == 0
    assert np.load("x.npy") == pytest.approx(np.load("y.npy"), rel=1e-2, abs=0.1)
    assert command(["evaluate", run.name, "--device", "cuda", "-n", "100", "--repeats", "1"]) == 0
    assert "sliced_wasserstein" in capsys.readouterr().out
    log = flowjobs("logs", run.name).stdout
    assert "Traceback" not in log
    assert "Warning" not in log, log


def test_a_local_job_that_meets_its_time_limit_starts_again_and_ends_with_the_same_bits(
    flowjobs: Command, study: Path
) -> None:
    def submit(name: str, *options: str) -> Run:
        epochs = ("--epochs", "150", "--patience", "150", "--no-evaluate", "--deterministic")
        quiet = ("--wandb-mode", "disabled")
        done = flowjobs("submit", "--name", name, "--cluster", "local", *epochs, *quiet, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(study, name)

    parts = submit("parts", "--no-follow")
    wait_until(lambda: [*read_rows(parts.metrics_file)], "the run to train", 120)
    os.kill(parts.status().attempts[-1].job.pid, signal.SIGUSR2)
    whole = submit("whole")  # meanwhile
    wait_until(lambda: parts.status().state == "finished", "its end", 120)
    first, second = parts.status().attempts
    assert (first.state, first.kind) == ("preempted", "time limit")
    assert first.last_step == second.first_step
    assert_same_bits(whole, parts)
