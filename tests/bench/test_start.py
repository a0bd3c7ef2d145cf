"""The command line's start against importing its parser."""

import os
import resource
import statistics
import subprocess
import sys

import pytest

pytestmark = pytest.mark.bench


def cpu_s(*arguments: str) -> float:
    """User and system time of one fresh interpreter."""
    # As an installed package has it: compiled once.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=kept, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", [("--help",), ("submit", "--help")])
def test_help_takes_under_two_and_a_half_imports_of_tyro(command: tuple[str, ...]) -> None:
    cpu_s("-m", "flowjobs", *command)
    ratios = [cpu_s("-m", "flowjobs", *command) / cpu_s("-c", "import tyro") for _ in range(15)]
    ratio = statistics.median(ratios)
    print(f"\n{' '.join(command)}: {ratio:.2f} times the CPU time of importing tyro")
    assert ratio < 2.5
