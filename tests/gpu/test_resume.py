"""A run that is told to leave or killed, each time in a process of its own, ends as a whole one."""

import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_PREEMPTED
from flowjobs.training.same_bits import differences
from tests.gpu.runs import (
    CONFIG,
    STEPS_PER_EPOCH,
    assert_same_bits,
    train,
    two_clusters,
    val_losses,
)
from tests.training import warm_process

pytestmark = pytest.mark.gpu

ARCHS = ("mlp", "unet", "dit")
EPOCHS = 40
# In which step each process is disturbed, and by what; at a kill, some moment later.
DISTURBED = ((25, signal.SIGTERM), (90, signal.SIGKILL), (300, signal.SIGUSR2))


def attempt(options: list[str], at: int | None, number: int, delay_s: float) -> None:
    """One attempt from the command line, that is sent a signal once it has trained a step."""
    from flowjobs.cli.main import main
    from flowjobs.training import saving
    from flowjobs.training.trainer import Trainer

    real = Trainer._agreed_to_leave
    sent = threading.Event()

    def kill() -> None:
        time.sleep(delay_s)  # while the next steps are trained
        os.kill(os.getpid(), number)

    def agreed(trainer: Trainer, *arguments: object) -> str | None:
        if trainer.state.step == at and not sent.is_set():
            sent.set()
            if number == signal.SIGKILL:
                threading.Thread(target=kill).start()
            else:
                os.kill(os.getpid(), number)
        return real(trainer, *arguments)  # type: ignore[arg-type]

    Trainer._agreed_to_leave = agreed  # type: ignore[method-assign]
    saving.COST_SHARE = 1e9  # saves whenever no save is under way
    main(options)


def run_attempt(options: list[str], at: int | None, number: int = 0, delay_s: float = 0) -> int:
    """Its exit code."""
    log = Path("log").absolute()
    process = warm_process.start(attempt, options, at, number, delay_s, log=log)
    process.join()
    assert process.exitcode is not None
    said = log.read_text()
    assert "Traceback" not in said, said[-5000:]
    assert "set aside" not in said
    return process.exitcode


@pytest.mark.parametrize("arch", ARCHS)
def test_told_to_leave_and_killed_it_ends_with_the_bits_of_a_whole_run(
    study: Path, arch: str
) -> None:
    torch.save(two_clusters(32 * STEPS_PER_EPOCH * 100 // 85 + 1, seed=1), "data.pt")

    def options(name: str) -> list[str]:
        return [
            *("train", "--name", name, "--wandb-mode", "disabled", "--dataset", "data.pt"),
            *("--arch", arch, "--width", "64", "--depth", "1", "--arch-args", "dropout=0.1"),
            *("--batch-size", "32", "--epochs", str(EPOCHS), "--patience", str(EPOCHS)),
            *("--checkpoint-every-s", "0", "--deterministic", "--no-evaluate"),
        ]

    whole, parts = Run(study, "whole"), Run(study, "parts")
    assert run_attempt(options("whole"), None) == 0
    delay_s = random.Random(arch).uniform(0, 0.03)
    for step, number in DISTURBED:
        code = run_attempt(options("parts"), step, number, delay_s)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_PREEMPTED)
    assert run_attempt(options("parts"), None) == 0
    assert_same_bits(whole, parts)

    first, killed, told, last = parts.status().attempts
    assert (first.kind, told.kind) == ("told to leave", "told to leave")
    assert (first.last_step, killed.first_step) == (25, 25)
    assert killed.state == "failed"
    assert told.first_step is not None
    assert told.first_step >= 25
    assert (told.last_step, last.first_step) == (300, 300)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_the_default_gives_is_said(study: Path, device: torch.device, arch: str) -> None:
    """Without --deterministic: the same run to rounding, and whether to the bit is printed."""
    config = replace(CONFIG, arch=arch)
    first, second = Run(study, "first"), Run(study, "second")
    for run in (first, second):
        train(run, config, device)
    differing = differences(first, second)
    print(f"\n{arch} without --deterministic: {', '.join(differing) or 'the same bits'}")
    assert val_losses(second) == pytest.approx(val_losses(first), rel=1e-3)
    # With it another sum may be taken, of the same numbers.
    exact = Run(study, "exact")
    train(exact, replace(config, deterministic=True), device)
    assert val_losses(exact) == pytest.approx(val_losses(first), rel=1e-2)
