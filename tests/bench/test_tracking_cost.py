"""What W&B costs: training with it against training without, and the start when it is away."""

import contextlib
import io
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flowjobs.config import KeyValues, TrainingConfig, WandbMode
from flowjobs.runs.run import Run
from tests.bench.loops import flowjobs_loop
from tests.bench.ratios import paired_ratios
from tests.tracking.backend import KEY

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# W&B's client takes 0.7 s of CPU as it starts, then 0.6 ms a row. On a GPU node a job has CPUs
# beside the one that drives its GPU: with a core to spare it costs nearly nothing even here, 30
# rows a second for 15 s.
SHORT = TrainingConfig(epochs=150, patience=1000)
# Where every core computes training lacks what the client takes, 4 % of a run of 20 s such as the
# one above: here a run for which a cluster is worth while, with steps of 25 ms, 8 rows a second,
# for two minutes.
LONGER = TrainingConfig(
    epochs=1200, patience=1000, batch_size=256, arch_args=KeyValues({"width": 512})
)

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


@contextlib.contextmanager
def server_that_never_answers() -> Iterator[str]:
    """An address that takes connections and says nothing, as behind a firewall that drops."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def training(config: TrainingConfig, mode: WandbMode, study: Path) -> Callable[[], None]:
    def run() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            flowjobs_loop(config, study, DEVICE, mode)

    return run


@contextlib.contextmanager
def computing_on(cores: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tracking", ["offline", "server away"])
@pytest.mark.parametrize(
    ("config", "spare_cores", "rounds"), [(SHORT, 1, 5), (LONGER, 0, 3)], ids=["spare", "busy"]
)
def test_training_with_tracking_is_as_fast_as_without(
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    tracking: str,
    config: TrainingConfig,
    spare_cores: int,
    rounds: int,
) -> None:
    mode: WandbMode = "offline" if tracking == "offline" else "online"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    tracked, untracked = training(config, mode, study), training(config, "disabled", study)
    with computing_on(len(os.sched_getaffinity(0)) - spare_cores):
        ratios = paired_ratios(tracked, {"disabled": untracked}, rounds)
    print(f"{tracking}, {spare_cores} cores spare: {ratios['disabled']:.3f} of the speed without")
    assert ratios["disabled"] >= 0.98


def first_row_s(study: Path, mode: WandbMode, url: str, name: str) -> float:
    """From starting the process to its first row, in seconds."""
    run = Run(study, name)
    started = time.perf_counter()
    command = ["train", "--name", name, "--epochs", "1000", "--wandb-mode", mode]
    process = subprocess.Popen(
        [sys.executable, "-m", "flowjobs", *command],
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
