"""A signal in the middle of a real run: it saves at a step boundary and goes on from there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint

OPTIONS = ("--wandb-mode", "disabled", "--arch-args", "width=32", "depth=1", "dropout=0.1")


def start(name: str, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "flowjobs", "train", "--name", name, *OPTIONS, *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the signal below reaches its readers, and not pytest
    )


def wait_for_steps(run: Run, process: "subprocess.Popen[str]", steps: int) -> None:
    deadline = time.monotonic() + 60
    while not any(row["step"] >= steps for row in read_rows(run.metrics_file)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "placement"),
    [(signal.SIGTERM, "loader"), (signal.SIGUSR2, "device"), (signal.SIGINT, "device")],
)
def test_a_signal_to_all_processes_loses_no_step(
    study: Path, number: signal.Signals, placement: str
) -> None:
    options = ("--epochs", "40", "--data-placement", placement)
    run = Run(study, "interrupted")
    process = start("interrupted", *options)
    wait_for_steps(run, process, 50)
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    status = run.status()
    assert status is not None
    assert status.state == "preempted"
    assert ("Ctrl-C" if number is signal.SIGINT else number.name) in status.reason
    saved = read_checkpoint(run.last)["step"]
    assert saved == status.step >= 50

    for name in ("interrupted", "whole"):
        process = start(name, *options)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    whole = Run(study, "whole")
    assert list(read_rows(run.metrics_file)) == list(read_rows(whole.metrics_file))
    weights = [read_checkpoint(which.last)["model_state_dict"] for which in (run, whole)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    status = run.status()
    assert status is not None
    assert [attempt.first_step for attempt in status.attempts] == [0, saved]
