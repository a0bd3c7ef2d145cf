"""A signal in the middle of a real run: it saves at a step boundary and goes on from there."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flowjobs.jobs.signals import StopSignals
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint

REPOSITORY = Path(__file__).parents[2]


def start(name: str, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "flowjobs", "train", "--name", name, *options]
    command += ["--wandb-mode", "disabled"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the signal below reaches its readers, and not pytest
    )


def wait_for_steps(run: Run, process: "subprocess.Popen[str]", steps: int) -> None:
    deadline = time.monotonic() + 240
    while not any(row["step"] >= steps for row in read_rows(run.metrics_file)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "placement"),
    [
        (signal.SIGTERM, "loader"),
        (signal.SIGUSR2, "device"),
        (signal.SIGINT, "device"),
        pytest.param(signal.SIGHUP, "device", marks=pytest.mark.long),
    ],
)
def test_a_signal_to_all_processes_loses_no_step(
    study: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, placement: str
) -> None:
    # It gets no further than step 50 before it is told, however late on a busy machine.
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    Path("control").write_text("await 50")
    slow = ("--arch", "tests.jobs.slow_model:SlowModel", "--arch-args", "control=control")
    options = (*slow, "pause_s=0", "--epochs", "8", "--data-placement", placement)
    run = Run(study, "interrupted")
    process = start("interrupted", *options)
    wait_for_steps(run, process, 50)
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    status = run.status()
    assert status.state == "preempted"
    assert ("Ctrl-C" if number is signal.SIGINT else number.name) in status.reason
    saved = read_checkpoint(run.last)["step"]
    assert saved == status.step >= 50

    for name in ("interrupted", "whole"):
        process = start(name, *options)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    whole = Run(study, "whole")
    assert list(read_rows(run.metrics_file)) == list(read_rows(whole.metrics_file))
    weights = [read_checkpoint(which.last)["model_state_dict"] for which in (run, whole)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    status = run.status()
    assert [attempt.first_step for attempt in status.attempts] == [0, saved]


def test_handlers_that_a_persons_module_sets_lose_no_signal() -> None:
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as the model is imported
        assert signals.reason() is None  # after the first step
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.reason() == "told to leave (SIGTERM)"


def test_a_signal_in_any_phase_loses_no_step_and_never_kills(study: Path) -> None:
    command = [sys.executable, "-m", "flowjobs", "train", "--wandb-mode", "offline"]
    command += ["--arch-args", "width=32", "depth=1", "dropout=0.1", "--epochs", "12"]
    run = Run(study, "interrupted")

    def reached() -> tuple[int, int]:
        return len(run.status().attempts), len(list(read_rows(run.metrics_file)))

    def is_in(phase: str, attempts: int, rows: int) -> bool:
        """Whether a start is there, before which there were so many attempts and rows."""
        newest = run.status().attempts[attempts:]
        match phase:
            case "imports":
                return bool(newest)
            case "first steps":
                return bool(newest) and newest[0].first_step is not None
            case "validation and saves":
                return reached()[1] > rows + 3
        return True

    for phase in ("command line", "imports", "first steps", "validation and saves"):
        attempts, rows = reached()
        # As a batch script starts it: blocked signals wait until there are handlers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
        try:
            process = subprocess.Popen(
                [*command, "--name", run.name],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        deadline = time.monotonic() + 600
        while not is_in(phase, attempts, rows) and process.poll() is None:
            assert time.monotonic() < deadline, phase
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGUSR2)
        said, _ = process.communicate(timeout=600)
        assert process.returncode in (75, 0), said
        assert "Traceback" not in said
    assert subprocess.run([*command, "--name", run.name], check=False).returncode == 0
    status = run.status()
    starts = [attempt.first_step for attempt in status.attempts]
    ends = [attempt.last_step for attempt in status.attempts]
    assert starts[1:] == ends[:-1]  # each goes on where the one before it left

    assert subprocess.run([*command, "--name", "whole"], check=False).returncode == 0
    whole = Run(study, "whole")
    assert list(read_rows(run.metrics_file)) == list(read_rows(whole.metrics_file))
    weights = [read_checkpoint(which.last)["model_state_dict"] for which in (run, whole)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
