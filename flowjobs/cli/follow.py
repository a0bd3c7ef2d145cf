"""Watching a run from outside, by its folder alone: the same on Slurm and on this machine."""

import shutil
import sys
import time
from collections.abc import Callable

from flowjobs.cli.evaluation_table import in_a_line
from flowjobs.cli.overview import UNKNOWN_AT_MOST
from flowjobs.errors import ConfigError, SubmissionError
from flowjobs.runs.hint import hint
from flowjobs.runs.metrics import Row
from flowjobs.runs.progress import current_progress
from flowjobs.runs.run import Run
from flowjobs.runs.status import CANCELLED, EXIT_FAILED, RunStatus

POLL_S = 0.3
# Time for the last words of a process that has ended to be seen over a shared file system.
LAST_WORDS_S = 2.0
ASK_SLURM_EVERY_S = 10.0
# With less, a job may not even have said what stopped it.
FULL_BYTES = 100_000
FINAL_STATES = ("finished", "failed", "cancelled")


def follow(
    run: Run,
    attempts_before: int,
    alive: Callable[[], bool],
    waits: Callable[[], str] = str,
    *,
    requeues: bool,
) -> int:
    """Draw a progress bar until the run ends. Ctrl-C stops watching; the job keeps running.

    Args:
        run: The run.
        attempts_before: How many attempts it had before the job was submitted.
        alive: Whether the job still waits or runs.
        waits: Why it waits, to be read after "waits"; empty if it does not, or nobody says.
        requeues: Whether the scheduler starts a preempted job again, so that its end is not the
            run's.

    Returns:
        The exit code of the run's last attempt; 0 after Ctrl-C.

    Raises:
        SubmissionError: For some looks in a row nothing is known of the job.
    """
    try:
        status = _watch(run, attempts_before, alive, waits, requeues)
    except KeyboardInterrupt:
        print(f"\nno longer watching; {run.name} keeps running", file=sys.stderr)
        return 0
    if status is None:
        print(f"see {hint('logs', run.name, study=run.study)}", file=sys.stderr)
        print(f"error: the job ended without a result: {_why_it_died(run)}", file=sys.stderr)
        return EXIT_FAILED
    code = 0 if status.exit_code is None else status.exit_code
    if status.state == "finished":
        print(f"finished  {status.epoch} epochs, best validation loss {status.best_val_loss:.4f}")
        print(f"weights   {run.best}")
        none = f"none: see {hint('logs', run.name, study=run.study)}"
        print(f"samples   {run.samples_picture if run.samples_picture.exists() else none}")
        measures = in_a_line(run)
        if measures or run.config().training.evaluate:
            print(f"metrics   {measures or none}")
    else:
        if status.state == "failed":
            print(f"see {hint('logs', run.name, study=run.study)}", file=sys.stderr)
        print(f"{status.state}: {status.reason}", file=sys.stderr)
    return code


def _watch(
    run: Run,
    attempts_before: int,
    alive: Callable[[], bool],
    waits: Callable[[], str],
    requeues: bool,
) -> RunStatus | None:
    from flowjobs.cli.live_line import LiveLine  # slow to load

    gone_at: float | None = None
    asked_at = 0.0
    why = ""
    unknown, step = 0, None  # looks in a row, since the folder showed a new step
    with LiveLine() as line:
        while True:
            # A scheduler is asked seldom: forty of these may watch at once.
            pause_s = ASK_SLURM_EVERY_S if requeues else 0.0
            if gone_at is None and time.monotonic() - asked_at >= pause_s:
                asked_at = time.monotonic()
                try:
                    gone_at = None if alive() else asked_at
                    unknown, why = 0, waits()
                except SubmissionError as error:  # Slurm does not answer: no news
                    unknown, why = unknown + 1, str(error)
            status, latest = _progress(run)
            if latest.get("step") != step:
                unknown, step = 0, latest.get("step")
            begun = len(status.attempts) > attempts_before
            if unknown:
                line.say(why)
            elif begun:
                line.show(status, latest)
            else:
                line.say(f"waits {why}" if why else "waiting for the job to start")
            if begun and _ended(status, waits_for_requeue=requeues and gone_at is None):
                return status
            if unknown == UNKNOWN_AT_MOST:
                again = hint("status", run.name, study=run.study)
                raise SubmissionError(f"no longer watching: {why}; {again} looks again")
            if gone_at is not None and time.monotonic() - gone_at > LAST_WORDS_S:
                if begun or not run.cancel_requested():
                    return None
                status.record_outcome(CANCELLED)  # before it began, so that no attempt says it
                return status
            time.sleep(POLL_S)


def _progress(run: Run) -> tuple[RunStatus, Row]:
    try:
        return current_progress(run)
    except ConfigError:  # damaged before the job: its attempt writes it anew
        return RunStatus(), {}


def _ended(status: RunStatus, *, waits_for_requeue: bool) -> bool:
    if status.state == "preempted":
        return not waits_for_requeue
    return status.state in FINAL_STATES


def _why_it_died(run: Run) -> str:
    """What is known of a job that could not say how it ended: as `status` has it, if it trained."""
    from flowjobs.jobs.dead_jobs import DeadJob, final_outcome, find_dead_jobs
    from flowjobs.jobs.exit_cause import log_tail

    if shutil.disk_usage(run.folder).free < FULL_BYTES:
        return f"the disk of {run.study} is full; make room, then resume the run"
    status, finding = run.status(), find_dead_jobs([run]).get(run)
    if status.open_attempt and isinstance(finding, DeadJob):
        return final_outcome(run, status, finding).reason
    newest = run.newest_job()
    lines = log_tail(str(run.log_at(newest.log))).splitlines() if newest else []
    return lines[-1] if lines else "it has no log"
