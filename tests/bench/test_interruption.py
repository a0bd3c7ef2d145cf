"""An interruption from outside: from the signal to the end of the process, and up again."""

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flowjobs.runs.metrics import latest_values
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint, write_checkpoint

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 2 if DEVICE == "cuda" else 9

OPTIONS = (
    *("--name", "a", "--wandb-mode", "disabled"),
    *("--epochs", "1000000", "--patience", "1000000"),
)
# What any start needs: torch, the device, and the file there.
LOAD = "import sys, torch; torch.load(sys.argv[1], weights_only=True, map_location=sys.argv[2])"


def wait_for_step(run: Run, process: "subprocess.Popen[bytes]", above: int) -> int:
    """Wait until a step above this one is on record; each tenth is."""
    while True:
        step = step_of(run)
        if step > above:
            return step
        assert process.poll() is None, "it ended before"
        time.sleep(0.005)


def step_of(run: Run) -> int:
    """The newest step on record."""
    return int(latest_values(run.metrics_file).get("step", 0))


def interrupt(study: Path) -> tuple[float, float, float]:
    """Start the run again and stop it.

    Returns:
        Seconds from the start to the first new steps, of a step, and from the signal to the end.
    """
    run = Run(study, "a")
    before = step_of(run)
    command = [sys.executable, "-m", "flowjobs", "train", *OPTIONS]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=study.parent
    )
    first = wait_for_step(run, process, before)
    stepped = time.perf_counter()
    last = wait_for_step(run, process, first + 100)
    signalled = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    ended = time.perf_counter()
    return stepped - started, (signalled - stepped) / (last - first), ended - signalled


def test_an_interruption_takes_little_more_than_it_must(study: Path) -> None:
    interrupt(study)
    last = Run(study, "a").last
    payload = read_checkpoint(last)
    starts, loads, ends, needs = [], [], [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", LOAD, str(last), DEVICE], check=True)
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
        f"{statistics.median(loads):.2f} s to load torch and the file: {up:.2f} times that"
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
