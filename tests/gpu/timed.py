"""Times loops on one GPU, one after the other, each in a process of its own."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from flowjobs.config import TrainingConfig
from tests.bench.ratios import tests_on_path

# Of this length, and so often; the best one counts, since others may only have slowed it down.
SECONDS, ROUNDS = 1.0, 2
# POT loads what else it could compute with, where that is installed, which takes seconds.
NO_OTHERS = {f"POT_BACKEND_DISABLE_{name}": "1" for name in ("JAX", "CUPY", "TENSORFLOW")}


@dataclass
class Speed:
    """How fast a loop is.

    Attributes:
        samples_per_s: With all that it does, in the best round; NaN where it failed.
        alone: Of our trainer, of the steps between two validations; NaN of others.
        note: Whether its steps are captured in a graph, or why it failed.
    """

    samples_per_s: float = math.nan
    alone: float = math.nan
    note: str = ""


@dataclass
class Table:
    """Speeds by name, and what they are called in the table."""

    title: str
    speeds: dict[str, Speed] = field(default_factory=dict)

    def ratio(self, ours: str, other: str, *, alone: bool = False) -> float:
        """How many times faster one is than another."""
        own = self.speeds[ours]
        return (own.alone if alone else own.samples_per_s) / self.speeds[other].samples_per_s

    def __str__(self) -> str:
        first = next(iter(self.speeds.values()), Speed())
        head = f"{self.title:34} {'samples/s':>12} {'steps alone':>12} {'of the first':>12}"
        lines = [head, "-" * len(head)]
        for name, speed in self.speeds.items():
            alone = "" if math.isnan(speed.alone) else f"{speed.alone:,.0f}"
            share = speed.samples_per_s / first.samples_per_s
            row = f"{name:34} {speed.samples_per_s:12,.0f} {alone:>12} {share:12.3f}"
            lines.append(f"{row}  {speed.note}".rstrip())
        return "\n".join(lines)


class TimedLoop:
    """A process of `tests.gpu.loops`; all are started before one is waited for.

    Args:
        loop: Its name there.
        config: What it trains.
        study: A folder of its own.
    """

    def __init__(self, loop: str, config: TrainingConfig, study: Path) -> None:
        study.mkdir(parents=True)
        self._log = study / "loop.log"
        self._is_ours = loop in ("trainer_loop", "tracked_loop", "unsaved_loop")
        # As a person's shell has it: no limit of threads, nothing of W&B.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OMP_NUM_THREADS", "WANDB_", "FLOWJOBS_"))
        }
        command = [sys.executable, "-m", "tests.gpu.loops", loop]
        command += [json.dumps(config.to_dict()), str(study)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**environment, **NO_OTHERS, "PYTHONPATH": tests_on_path()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=study,
                text=True,
            )
        self.speed = Speed()

    def wait_until_ready(self) -> None:
        """Wait until it is warm."""
        self._answer()

    def time(self, seconds: float) -> None:
        """Let it train for so long."""
        if self.speed.note:
            return
        assert self.process.stdin is not None
        try:
            print(seconds, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self._fail()
            return
        if answer := self._answer():
            found = json.loads(answer)
            # max() would keep a first NaN.
            self.speed.samples_per_s = _larger(self.speed.samples_per_s, found["samples_per_s"])
            self.speed.alone = _larger(self.speed.alone, found["alone"])

    def end(self) -> None:
        """Let it end, and note whether it was captured."""
        if self.speed.note:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self._is_ours and (answer := self._answer()):
            captured = json.loads(answer)["captured"]
            words = ["captured" if captured else "not captured", *self._refusals()]
            self.speed.note = "; ".join(words)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = "" if self.speed.note else self.process.stdout.readline()
        if not answer:
            self._fail()
        return answer

    def _fail(self) -> None:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        self.speed.note = self.speed.note or f"FAILED: {lines[-1] if lines else 'no word'}"

    def _refusals(self) -> list[str]:
        """What is not captured, and why, as its log has it."""
        lines = self._log.read_text(errors="replace").splitlines()
        # After the level and the logger's name.
        return [line.split(":", 2)[-1] for line in lines if "not captured" in line]


def timed_tables(
    groups: Mapping[str, Mapping[str, tuple[str, TrainingConfig]]], folder: Path
) -> list[Table]:
    """Time loops, a table of them after the other; all are started before the first is timed.

    Args:
        groups: By the title of a table and the name in it: the loop, and its config.
        folder: What they write.
    """
    with ExitStack() as stack:
        timed: dict[str, dict[str, TimedLoop]] = {}
        for title, loops in groups.items():
            timed[title] = {}
            for name, (loop, config) in loops.items():
                started = TimedLoop(loop, config, folder / f"{len(timed)}-{len(timed[title])}")
                stack.callback(_kill, started.process)
                timed[title][name] = started
        for of_table in timed.values():
            for loop in of_table.values():
                loop.wait_until_ready()
        tables = []
        for title, of_table in timed.items():
            for _ in range(ROUNDS):
                for loop in of_table.values():
                    loop.time(SECONDS)
            for loop in of_table.values():
                loop.end()
            table = Table(title, {name: loop.speed for name, loop in of_table.items()})
            print(f"\n{table}", flush=True)  # if what follows takes too long, this is there
            tables.append(table)
    return tables


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # of a line that it has not read
                pipe.close()


def _larger(one: float, other: float | None) -> float:
    if other is None:
        return one
    return other if math.isnan(one) else max(one, other)
