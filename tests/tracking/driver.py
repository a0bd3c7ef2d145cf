"""A run without training: the rows of each step, recorded as a trainer records them.

`python -m tests.tracking.driver FOLDER STEPS [END]` goes on from the last "checkpoint", which is
taken every 20 steps, as an attempt after a kill does: some steps come again, with the same values.
"""

import sys
import time
from pathlib import Path
from typing import Any

from flowjobs.errors import RunInterrupted
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.tracking.tracker import tracked

CHECKPOINT_EVERY = 20


def row_of(step: int) -> dict[str, Any]:
    """What a deterministic run logs at a step; its loss is the lowest early."""
    row: dict[str, Any] = {"step": step, "epoch": step // 50, "train/loss": abs(step - 30) / 7}
    if step % 50 == 0:
        row["val/loss"] = 1 / step
    return row


def drive(run: Run, steps: int, end: str = "finish", pause_s: float = 0.0) -> None:
    """One attempt, to `steps` or until it is killed; `end`: finish, preempt or raise there."""
    checkpoint = run.folder / "checkpoint"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with recording(run, JobInfo.in_foreground(), track=tracked) as recorder:
        recorder.start_at(first)
        for step in range(first + 1, steps + 1):
            recorder.record(row_of(step))
            if step % CHECKPOINT_EVERY == 0:
                checkpoint.with_suffix(".new").write_text(str(step))
                checkpoint.with_suffix(".new").replace(checkpoint)
            time.sleep(pause_s)
        recorder.attempt.progress(steps, steps, epoch=2, best_val_loss=1 / 50)
        match end:
            case "preempt":
                checkpoint.write_text(str(steps))
                raise RunInterrupted("preempted (SIGUSR2)", steps)
            case "raise":
                raise ValueError("the bug")


if __name__ == "__main__":
    drive(Run.at(Path(sys.argv[1])), int(sys.argv[2]), *sys.argv[3:], pause_s=0.003)
