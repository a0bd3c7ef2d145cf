"""A run killed with SIGKILL at random instants ends with the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from flowjobs.runs.metrics import latest_values, read_rows
from flowjobs.runs.run import Run
from flowjobs.training import saving
from flowjobs.training.checkpoint import read_checkpoint
from tests.training import warm_process
from tests.training.same import same

ROWS, BATCH = 40, 8


@dataclass(frozen=True)
class Chaos:
    """How a run is tormented.

    Attributes:
        kills: Of attempts that train and save all the time.
        cold_kills: Of attempts started from the command line, which import torch first.
        epochs: Long enough that the kills do not outlast the run.
    """

    kills: int
    cold_kills: int
    epochs: int


def arguments(name: str, epochs: int) -> list[str]:
    return [
        *("train", "--name", name, "--wandb-mode", "disabled", "--dataset", "data.pt"),
        *("--arch-args", "width=16", "depth=1", "dropout=0.1", "--batch-size", str(BATCH)),
        *("--epochs", str(epochs), "--patience", str(epochs), "--checkpoint-every-s", "0"),
    ]


def attempt(options: list[str], last: int | None = None) -> None:
    """One attempt that saves whenever no save is under way, so that many kills hit one.

    Args:
        options: Of the command line.
        last: It gets no further than this step, however late its kill; None: to the end.
    """
    from flowjobs.cli.main import main
    from flowjobs.training.trainer import Trainer

    real, parent = Trainer._step, os.getppid()

    def step(trainer: Trainer) -> dict[str, float]:
        while trainer.state.step == last and os.getppid() == parent:
            time.sleep(0.01)
        return real(trainer)

    Trainer._step = step  # type: ignore[method-assign]
    torch.set_num_threads(1)
    saving.COST_SHARE = 1e9
    main(options)


def start_cold(options: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """The same from the command line as a person starts it, with the interval that it gives."""
    with log.open("a") as out:
        command = [sys.executable, "-m", "flowjobs", *options]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def ended_by(process: "BaseProcess | subprocess.Popen[bytes]") -> int | None:
    if isinstance(process, subprocess.Popen):
        return process.wait()
    process.join()
    return process.exitcode


def step_of(run: Run) -> int:
    return int(latest_values(run.metrics_file).get("step", 0))


def finish(options: list[str], log: Path) -> None:
    process = warm_process.start(attempt, options, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-5000:]


@pytest.mark.parametrize(
    "chaos",
    [
        Chaos(kills=6, cold_kills=1, epochs=400),
        pytest.param(Chaos(120, 10, 3500), marks=[pytest.mark.long, pytest.mark.timeout(7200)]),
    ],
)
def test_a_run_killed_at_random_ends_as_if_nothing_had_happened(study: Path, chaos: Chaos) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randn(ROWS, 4, generator=generator), "data.pt")
    whole, killed = Run(study, "whole"), Run(study, "killed")
    log = Path("killed.log").absolute()
    options = arguments(killed.name, chaos.epochs)
    # Which kills come where is drawn once; where they hit still depends on the machine's speed.
    chance = random.Random(3)
    order = [True] * chaos.cold_kills + [False] * chaos.kills
    chance.shuffle(order)
    hits, torn = 0, 0
    process: BaseProcess | subprocess.Popen[bytes]
    for cold in order:
        goal = step_of(killed) + chance.randrange(1, 120)
        if cold:
            process = start_cold(options, log)
            until = time.monotonic() + chance.uniform(0, 5)
            while time.monotonic() < until and step_of(killed) < goal:
                time.sleep(0.002)
        else:
            process = warm_process.start(attempt, options, goal + 30, log=log)
            while step_of(killed) < goal:
                assert process.is_alive(), log.read_text()[-5000:]
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.02))  # not only just after a row
        process.kill()
        hits += ended_by(process) == -signal.SIGKILL
        torn += any(killed.checkpoints.glob(".*.tmp"))
    assert hits == len(order), "the run was over before the last kill"
    finish(options, log)
    finish(arguments(whole.name, chaos.epochs), Path("whole.log").absolute())

    status = killed.status()
    firsts = [record.first_step for record in status.attempts if record.first_step is not None]
    print(
        f"\n{hits} kills; {len(firsts)} attempts came to train, {len(set(firsts))} went on from "
        f"another step than the one before; {torn} died within a save"
    )
    said = log.read_text()
    assert "damaged" not in said
    assert "set aside" not in said
    assert "Traceback" not in said
    assert firsts == sorted(firsts)
    assert len(firsts) >= chaos.kills
    assert same(read_checkpoint(whole.last), read_checkpoint(killed.last))
    assert same(read_checkpoint(whole.best), read_checkpoint(killed.best))
    assert whole.metrics_file.read_bytes() == killed.metrics_file.read_bytes()
    steps = [row["step"] for row in read_rows(killed.metrics_file)]
    assert steps == sorted(set(steps))
    assert steps[-1] == chaos.epochs * (ROWS * 85 // 100 // BATCH)
    assert not [name for name in os.listdir(killed.checkpoints) if name.startswith(".")]
