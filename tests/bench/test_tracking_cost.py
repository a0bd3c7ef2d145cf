"""What W&B costs: training with it against training without, and the start when it is away."""

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowjobs.config import WandbMode
from flowjobs.runs.run import Run
from tests.bench.ratios import seconds_in_turns
from tests.tracking.backend import KEY

CORES = len(os.sched_getaffinity(0))
# Digits for half a minute, with fifty rows a second far more than a run on a GPU logs. As W&B's
# client starts it takes 0.7 s of CPU, most of it while torch loads, and then 0.3 ms a row: 1.4 % of
# a core, which training lacks where every core computes. On a GPU there are hundreds of rows a
# second for some ten seconds, and half of the time is the start.
EPOCHS, ROUNDS = ("1500", 1) if torch.cuda.is_available() else ("400", 3)
WHAT = ["--epochs", EPOCHS, "--patience", EPOCHS, "--no-evaluate"]

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


@contextlib.contextmanager
def server_that_never_answers() -> Iterator[str]:
    """An address that takes connections and says nothing, as behind a firewall that drops."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("tracking", ["offline", "server away"])
@pytest.mark.parametrize("cores", [CORES - 1, CORES], ids=["spare", "busy"])
def test_training_with_tracking_is_as_fast_as_without(
    study: Path, tracking: str, cores: int
) -> None:
    modes = {"tracked": "offline" if tracking == "offline" else "online", "untracked": "disabled"}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(cores),
        "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nothing listens there
    }
    ratios = []
    for number in range(ROUNDS):
        commands = {
            name: flowjobs_train(f"{name}-{number}", mode, *WHAT) for name, mode in modes.items()
        }
        modes = dict(reversed(modes.items()))  # none always starts first
        seconds = seconds_in_turns(commands, environment)
        ratios.append(seconds["untracked"] / seconds["tracked"])
        print(f"\n{seconds['tracked']:.2f} s against {seconds['untracked']:.2f} s without", end="")
    ratio = statistics.median(ratios)
    print(f"\n{tracking}, {cores} of {CORES} cores compute: {ratio:.3f} of the speed without")
    assert ratio >= 0.98


def flowjobs_train(name: str, mode: str, *arguments: str) -> list[str]:
    """The command, for the study of the environment."""
    command = [sys.executable, "-m", "flowjobs", "train", "--name", name, "--wandb-mode", mode]
    return [*command, *arguments]


def first_row_s(study: Path, mode: WandbMode, url: str, name: str) -> float:
    """From starting the process to its first row, in seconds."""
    run = Run(study, name)
    started = time.perf_counter()
    process = subprocess.Popen(
        flowjobs_train(name, mode, "--epochs", "1000"),
        env={**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (run.metrics_file.exists() and run.metrics_file.stat().st_size):
        assert process.poll() is None, "it ended before its first row"
        time.sleep(0.01)
    took_s = time.perf_counter() - started
    process.send_signal(signal.SIGTERM)
    process.wait()
    return took_s


def test_the_start_does_not_wait_for_a_server(study: Path) -> None:
    later_s = []
    with server_that_never_answers() as silent:
        first_row_s(study, "offline", silent, "warm-up")
        for round_number in range(5):
            offline = first_row_s(study, "offline", silent, f"offline-{round_number}")
            online = first_row_s(study, "online", silent, f"online-{round_number}")
            later_s.append(online - offline)
    print(f"\nfirst row with a silent server against offline: {statistics.median(later_s):+.2f} s")
    assert statistics.median(later_s) <= 1.0
