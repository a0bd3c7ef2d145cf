"""Watching a run from outside, by its folder alone: the same on Slurm and on this machine."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from flowjobs.errors import SubmissionError
from flowjobs.runs.metrics import latest_values
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_FAILED, RunStatus

POLL_S = 0.3
# Time for the last words of a process that has ended to be seen over a shared file system.
LAST_WORDS_S = 2.0
ASK_SLURM_EVERY_S = 10.0
FINAL_STATES = ("finished", "failed", "cancelled")


def follow(run: Run, attempts_before: int, alive: Callable[[], bool], *, requeues: bool) -> int:
    """Draw a progress bar until the run ends. Ctrl-C stops watching; the job goes on.

    Args:
        run: The run.
        attempts_before: How many attempts it had before the job was submitted.
        alive: Whether the job still waits or runs.
        requeues: Whether the scheduler starts a preempted job again, so that its end is not the
            run's.

    Returns:
        The exit code of the run's last attempt; 0 after Ctrl-C.
    """
    try:
        status = _watch(run, attempts_before, alive, requeues)
    except KeyboardInterrupt:
        print(f"\nno longer watching; {run.name} goes on", file=sys.stderr)
        return 0
    if status is None:
        print(f"error: the job ended without a result: {_last_line(run)}", file=sys.stderr)
        return EXIT_FAILED
    code = 0 if status.exit_code is None else status.exit_code
    if status.state == "finished":
        print(f"finished  {status.epoch} epochs, best validation loss {status.best_val_loss:.4f}")
        print(f"weights   {run.best}")
        print(f"samples   {run.samples_picture}")
    else:
        print(f"{status.state}: {status.reason}", file=sys.stderr)
    return code


def _watch(
    run: Run, attempts_before: int, alive: Callable[[], bool], requeues: bool
) -> RunStatus | None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("waiting for the job to start", total=None, figures="")
        gone_at: float | None = None
        asked_at = 0.0
        while True:
            # A scheduler is asked seldom: forty of these may watch at once.
            pause_s = ASK_SLURM_EVERY_S if requeues else 0.0
            if gone_at is None and time.monotonic() - asked_at >= pause_s:
                asked_at = time.monotonic()
                with contextlib.suppress(SubmissionError):  # Slurm does not answer: no news
                    gone_at = None if alive() else asked_at
            status = run.status()
            if status and len(status.attempts) > attempts_before:
                latest = latest_values(run.metrics_file)
                progress.update(
                    bar,
                    description=f"{status.state}, epoch {status.epoch}/{status.epochs}",
                    total=status.total_steps,
                    completed=max(status.step, latest.get("step", 0)),
                    figures=_figures(latest),
                )
                if _ended(status, waits_for_requeue=requeues and gone_at is None):
                    return status
            if gone_at is not None and time.monotonic() - gone_at > LAST_WORDS_S:
                return None
            time.sleep(POLL_S)


def _ended(status: RunStatus, *, waits_for_requeue: bool) -> bool:
    if status.state == "preempted":
        return not waits_for_requeue
    return status.state in FINAL_STATES


def _last_line(run: Run) -> str:
    logs = [Path(entry["log"]) for entry in run.submissions()[-1:]]
    lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
    return lines[-1] if lines else f"it has no log; flowjobs status {run.name}"


def _figures(latest: dict[str, float]) -> str:
    keys = ("train/loss", "val/loss", "val/best_loss")
    losses = "  ".join(f"{key} {latest[key]:.4f}" for key in keys if key in latest)
    return f"step {latest.get('step', 0)}  {losses}"
