"""Every test has a working directory, a study and a user's config folder of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["tests.cluster.fixtures"]

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is loaded: threads of tests side by side would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """Ctrl-C and a hang-up mean something again where a shell, or nohup, started the tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before the plugin reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side, tests on Slurm take turns on two clusters, half on each, and tests on a GPU."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.xdist_group("gpu"))
        if "slurm_cluster" in getattr(item, "fixturenames", ()):
            half = "interruptions" if item.path.name == "test_nothing_is_lost.py" else "slurm"
            item.add_marker(pytest.mark.xdist_group(half))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where nothing of the person's own settings is seen."""
    for name in os.environ:
        if name.startswith(("WANDB_", "SBATCH_", "SLURM_", "FLOWJOBS_", "SUBMITIT_")):
            monkeypatch.delenv(name)
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    # Two threads of each of several jobs on two cores would wait for one another.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture
def study(workplace: Path) -> Path:
    """The default study of the working directory; not made yet."""
    return workplace / "study"


@pytest.fixture
def flowjobs() -> Command:
    """Runs `python -m flowjobs …` as a person would, in the working directory."""

    def run(*arguments: str, timeout_s: float = 1800) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flowjobs", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run
