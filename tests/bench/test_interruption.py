"""An interruption from outside: from the signal to the end of the process, and up again."""

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint, write_checkpoint

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

# Says when a step is done: the next one begins.
MODEL = """
from flowjobs.models.mlp import MLP

class Telling(MLP):
    steps = 0

    def forward(self, x, t):
        if self.training:
            Telling.steps += 1
            if Telling.steps in (2, 102):
                print("stepped", flush=True)
        return super().forward(x, t)
"""
OPTIONS = (
    *("--name", "a", "--arch", "model:Telling", "--wandb-mode", "disabled"),
    *("--epochs", "100000", "--patience", "100000"),
)
LOAD = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"


def interrupt(study: Path) -> tuple[float, float, float]:
    """Start the run again and stop it.

    Returns:
        Seconds from the start to the first new step, of a step, and from the signal to the end.
    """
    command = [sys.executable, "-m", "flowjobs", "train", *OPTIONS]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=study.parent
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == b"stepped\n":
            break
    stepped = time.perf_counter()
    process.stdout.readline()
    hundred_more = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    ended = time.perf_counter()
    process.stdout.close()
    return stepped - started, (hundred_more - stepped) / 100, ended - hundred_more


def test_an_interruption_takes_little_more_than_it_must(study: Path) -> None:
    (study.parent / "model.py").write_text(MODEL)
    interrupt(study)
    last = Run(study, "a").last
    payload = read_checkpoint(last)
    starts, loads, ends, needs = [], [], [], []
    for _ in range(9):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", LOAD, str(last)], check=True)
        loads.append(time.perf_counter() - started)
        start, step, end = interrupt(study)
        started = time.perf_counter()
        write_checkpoint(study / "bench.pt", payload)
        needs.append(step + time.perf_counter() - started)
        starts.append(start)
        ends.append(end)
    up = statistics.median(ours / theirs for ours, theirs in zip(starts, loads, strict=True))
    print(
        f"\nup: {statistics.median(starts):.2f} s to the first new step, "
        f"{statistics.median(loads):.2f} s to import torch and load the file: {up:.2f} times that"
    )
    over = statistics.median(ours - theirs for ours, theirs in zip(ends, needs, strict=True))
    down = statistics.median(ours / theirs for ours, theirs in zip(ends, needs, strict=True))
    print(
        f"down: {statistics.median(ends):.3f} s from the signal to the end, "
        f"{statistics.median(needs):.3f} s for a step and a write: {over:.3f} s more, "
        f"{down:.1f} times that"
    )
    assert up < 1.3
    # The rest is the end of an interpreter that has loaded torch.
    assert over < 0.3 * statistics.median(loads)
