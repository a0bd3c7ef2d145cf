"""One start of a run: the lock, the entry in `status.json`, and the outcome."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from flowjobs.errors import NoProgressError, RunTakenOverError
from flowjobs.runs.extending import Extension, extension_of
from flowjobs.runs.lock import Judge, RunLock, system_lock_decides
from flowjobs.runs.restarts import attempts_without_progress
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    EXIT_FAILED,
    AttemptRecord,
    JobInfo,
    Outcome,
    now,
    outcome_of,
)

logger = logging.getLogger(__name__)

# How old the progress in status.json may be. metrics.jsonl has every logged step; the status is
# for a glance, and a file system shared by forty runs should not see one write a second of each.
STATUS_EVERY_S = 5.0


def died_silently(record: AttemptRecord) -> Outcome:
    """The default outcome of an attempt whose process died silently."""
    reason = f"attempt {record.number} died silently, {record.job.description}"
    return Outcome("failed", EXIT_FAILED, reason, kind="killed")


class Attempt:
    """Holds the run while the block lasts, and writes down what it does and how it ended.

    Args:
        run: The run to hold.
        job: Where this attempt runs.
        judge: Says whether the attempt that is named as the run's holder still lives.
        explain: Says how an attempt ended that could not say it itself.

    Attributes:
        number: Which of the run's attempts it is, from 1.

    Raises:
        RunBusyError: On entering: another attempt holds the run.
        NoProgressError: On entering: too many attempts have ended without a new step.
    """

    def __init__(
        self,
        run: Run,
        job: JobInfo,
        judge: Judge = system_lock_decides,
        explain: Callable[[AttemptRecord], Outcome] = died_silently,
    ) -> None:
        self.run = run
        self.job = job
        self._lock = RunLock(run.folder, job, judge)
        self._explain = explain
        self._stack = ExitStack()
        self._written_at = 0.0
        self.number = 0

    def __enter__(self) -> "Attempt":
        with self._stack:
            self._stack.enter_context(self._lock)
            self._status = self.run.status()
            if before := self._status.open_attempt:
                outcome = self._explain(before)
                self._status.record_outcome_of_dead(outcome, self.run.metrics_file)
                logger.warning("%s", outcome.reason)
            self._open()
            self._stack = self._stack.pop_all()  # all is well: the lock is kept
        # jobs/exit_cause.py finds the attempt's part of a log by this line: change both.
        logger.info("attempt %d at %s: %s", self.number, self.run.name, self.job.description)
        return self

    def _open(self) -> None:
        config = self.run.config()
        self.number = len(self._status.attempts) + 1
        self._record = AttemptRecord(self.number, self.job, started=now())
        self._status.attempts.append(self._record)
        self._status.state, self._status.exit_code = "running", None
        self._status.reason = self._status.traceback = ""
        # The trainer says it exactly, but after tracking has begun.
        before = {"epochs": self._status.epochs, "patience": self._status.patience}
        if extension := extension_of(before, config.training, self._status.step):
            self._status.extensions.append(extension)
        self._status.epochs = config.training.epochs
        self._status.patience = config.training.patience
        self._check_progress()
        self._status.write(self.run.status_file)

    def _check_progress(self) -> None:
        *before, _ = self._status.attempts
        fruitless = attempts_without_progress(self._status.attempts)
        if fruitless < self.run.config().restarts.give_up_after:
            return
        error = NoProgressError(
            f"{fruitless} attempts in a row ended without a new step, the last one: "
            f"{before[-1].reason}; the run is not started again by itself (--give-up-after): "
            "mend the cause, then submit it again"
        )
        self._status.record_outcome(outcome_of(error))
        self._status.write(self.run.status_file)
        raise error

    def check_held(self) -> None:
        """Raise a RunTakenOverError if another attempt has taken the run over."""
        self._lock.check_held()

    def note_model(
        self, model: str, code: str, parameters: int, flops_per_sample: int | None
    ) -> None:
        """Note which model it is, and how large; reaches the disk with what is noted next."""
        # A job that resumes a run from Python has none of its own.
        self._status.model, self._status.model_code = model, code or self._status.model_code
        self._status.parameters, self._status.flops_per_sample = parameters, flops_per_sample

    def note_divergence(self, after_step: int) -> None:
        """Note on disk that lost rows past a step come again with other values."""
        before = self._status.diverged_after
        self._status.diverged_after = after_step if before is None else min(before, after_step)
        self._write()

    def start_at(self, step: int, extensions: Sequence[Extension] = ()) -> None:
        """Note the step that this attempt starts at, and how it was extended, for `trains_now`."""
        self._status.extensions = [*extensions]
        self._record.first_step = self._record.last_step = step
        self._status.step = step
        # Again: loading may have taken long, and only now is it known where this attempt starts.
        self._lock.check_held()
        self._check_progress()

    def trains_now(self) -> None:
        """Note on disk that training begins: from now on all rows of `metrics.jsonl` count."""
        self._record.trains = now()
        self._status.write(self.run.status_file)

    def progress(
        self, step: int, total_steps: int, epoch: int, best_val_loss: float | None
    ) -> None:
        """Note how far the run is; reaches the disk every few seconds and at the end."""
        self._record.last_step = step
        self._status.step, self._status.total_steps = step, total_steps
        self._status.epoch, self._status.best_val_loss = epoch, best_val_loss
        self._write_now_and_then()

    def note_pairs_written(self) -> None:
        """Count a chunk of reflow pairs as progress, for --give-up-after."""
        self._record.prepared += 1
        self._write_now_and_then()

    def _write_now_and_then(self) -> None:
        if time.monotonic() - self._written_at > STATUS_EVERY_S:
            self._write()

    def _write(self) -> None:
        # One that has lost the run would put its own word over the newer attempt's.
        self._lock.check_held()
        self._status.write(self.run.status_file, flush=False)
        self._written_at = time.monotonic()

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint has held up the training."""
        self._record.saving_s = round(self._record.saving_s + seconds, 3)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._stack:  # the lock is freed last
            if not isinstance(error, RunTakenOverError):
                self.record_outcome(outcome_of(error))

    def record_outcome(self, outcome: Outcome) -> None:
        """Write down how the attempt ended, if it still holds the run."""
        if self._lock.is_held():
            self._status.catch_up(self.run.metrics_file)
            self._status.record_outcome(outcome)
            self._status.write(self.run.status_file)
