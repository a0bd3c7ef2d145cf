"""Attempts at a run that record rows as training does, without torch: a start takes half a second.

`python -m tests.tracking.attempts FOLDER LAST_STEP PACE_S` is one attempt: it goes on from its
checkpoint, which is taken every fifth row, and leaves at a step boundary when it is told to.
"""

import base64
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig, WandbMode
from flowjobs.errors import RunInterrupted
from flowjobs.jobs.signals import StopSignals
from flowjobs.runs.files import replaced_whole
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.tracking.tracker import tracked

ROW_EVERY_STEPS = 10
SAVE_EVERY_STEPS = 50

# One white pixel.
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTjXJQAAAABJRU5ErkJggg=="
)

Row = dict[str, Any]


def make_run(study: Path, mode: WandbMode, name: str = "mirrored") -> Run:
    """A run whose attempts can begin."""
    run = Run(study, name)
    run.create(
        RunConfig(TrainingConfig(epochs=2), tracking=TrackingConfig(wandb_mode=mode)),
    )
    return run


def row_at(step: int) -> Row:
    """The row of a step: the same in every attempt, as training is exact on the same hardware."""
    row: Row = {"step": step, "epoch": step // 100, "train/loss": 1 / step + 1 / 3}
    if step > float(os.environ.get("OTHER_BITS_PAST", "inf")):
        row["train/loss"] += 1e-9
    if step % 100 == 0:
        row["val/loss"] = 2 / step
    return row


def hold(run: Run, step: int) -> None:
    """Let no attempt at the run go past a step, before `let_go` or a signal."""
    with replaced_whole(run.folder / "hold", flush=False) as file:
        file.write(str(step).encode())


def let_go(run: Run) -> None:
    """Let attempts at the run go on to their end."""
    (run.folder / "hold").unlink()


def held(run: Run, step: int) -> bool:
    """Whether a test keeps the run from this step for now."""
    with contextlib.suppress(FileNotFoundError):
        return step > int((run.folder / "hold").read_text())
    return False


def attempt(run: Run, last_step: int, pace_s: float) -> None:
    """One attempt, in this process."""
    checkpoint = run.folder / "step"
    with (
        StopSignals() as signals,
        recording(run, JobInfo.in_foreground(run.logs / "attempt.log"), track=tracked) as recorder,
    ):
        start = int(checkpoint.read_text()) if checkpoint.exists() else 0
        recorder.start_at(start)
        for step in range(start + ROW_EVERY_STEPS, last_step + 1, ROW_EVERY_STEPS):
            time.sleep(pace_s)
            while held(run, step) and not signals.reason():
                time.sleep(0.05)
            recorder.record(row_at(step))
            recorder.attempt.progress(step, last_step, step // 100, None)
            if step % SAVE_EVERY_STEPS == 0 and "NO_CHECKPOINT" not in os.environ:
                with replaced_whole(checkpoint, flush=False) as file:
                    file.write(str(step).encode())
            if reason := signals.reason():
                checkpoint.write_text(str(step))
                raise RunInterrupted(reason, step)
        time.sleep(float(os.environ.get("PICTURE_AFTER_S", "0")))
        run.samples_picture.write_bytes(PICTURE)


def start(run: Run, last_step: int, pace_s: float = 0.0) -> subprocess.Popen[str]:
    """One attempt, in a process of its own."""
    arguments = [str(run.folder), str(last_step), str(pace_s)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tracking.attempts", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 600) -> tuple[int, str]:
    """Wait for an attempt. Returns its exit code and what it said."""
    _, said = process.communicate(timeout=timeout_s)
    return process.returncode, said


def children(pid: int) -> list[int]:
    """The child processes of a process, by what the kernel says."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may have ended
            found += map(int, thread.read_text().split())
    return found


def mirror_and_core(trainer: int, but: int | None = None) -> tuple[int, int]:
    """The processes that mirror an attempt: ours (not `but`) and wandb's own. Waits for both."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        # A process may be gone between two looks at it.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for mirror in set(children(trainer)) - {but}:
                for core in children(mirror):
                    if b"wandb-core" in Path(f"/proc/{core}/cmdline").read_bytes():
                        return mirror, core
        time.sleep(0.02)
    raise AssertionError("wandb did not start")


def kill(*pids: int, with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Signal processes that may be gone already."""
    for pid in pids:
        try:
            os.kill(pid, with_signal)
        except ProcessLookupError:
            continue


def wait_for_rows(run: Run, count: int, timeout_s: float = 600) -> None:
    """Wait until `metrics.jsonl` has so many rows."""
    deadline = time.monotonic() + timeout_s
    while len(list(read_rows(run.metrics_file))) < count:
        assert time.monotonic() < deadline, "no rows came"
        time.sleep(0.02)


def main(arguments: Sequence[str]) -> None:
    folder, last_step, pace_s = arguments
    try:
        attempt(Run.at(Path(folder)), int(last_step), float(pace_s))
    except RunInterrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(75)


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO)
    main(sys.argv[1:])
