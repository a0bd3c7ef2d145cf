"""Runs side by side on one machine against the same runs one after the other."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
N = 4
SMALL = ("--epochs", "40")
LARGE = ("--epochs", "2", "--batch-size", "1024", "--arch-args", "width=1024", "depth=6")


def started(name: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flowjobs", "train", "--arch", "mlp", "--flow", "icfm"]
    command += ["--name", name, "--wandb-mode", "disabled", *options]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)


@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["small", "large"])
def test_four_at_once_take_no_longer_than_one_after_the_other(
    study: Path, options: tuple[str, ...]
) -> None:
    assert started("warm-up", options).wait() == 0
    began = time.perf_counter()
    for number in range(N):
        assert started(f"after-{number}", options).wait() == 0
    one_by_one_s = time.perf_counter() - began
    began = time.perf_counter()
    assert [run.wait() for run in [started(f"at-once-{n}", options) for n in range(N)]] == [0] * N
    at_once_s = time.perf_counter() - began
    ratio = at_once_s / one_by_one_s
    print(f"\n{N} runs one by one {one_by_one_s:.1f} s, at once {at_once_s:.1f} s: {ratio:.2f}")
    assert ratio < 1.1
