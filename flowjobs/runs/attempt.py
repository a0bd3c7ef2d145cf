"""One start of a run: the lock, the entry in `status.json`, and the outcome."""

import logging
import time
from contextlib import ExitStack
from types import TracebackType

from flowjobs.runs.lock import run_lock
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, RunStatus, now, outcome_of

logger = logging.getLogger(__name__)

# How old the progress in status.json may be. metrics.jsonl has every logged step; the status is
# for a glance, and a file system shared by forty runs should not see one write a second of each.
STATUS_EVERY_S = 5.0


class Attempt:
    """Holds the run while the block lasts, and writes down what it does and how it ended.

    Args:
        run: The run to hold.
        job: Where this attempt runs.

    Raises:
        RunBusyError: On entering: another attempt holds the run.
    """

    def __init__(self, run: Run, job: JobInfo) -> None:
        self.run = run
        self.job = job
        self._stack = ExitStack()
        self._written_at = 0.0

    def __enter__(self) -> "Attempt":
        self._stack.enter_context(run_lock(self.run.folder, self.job))
        self._status = self.run.status() or RunStatus()
        self._record = AttemptRecord(len(self._status.attempts) + 1, self.job, started=now())
        self._status.attempts.append(self._record)
        self._status.state, self._status.reason, self._status.exit_code = "running", "", None
        asked = self.run.config().training
        self._status.epochs, self._status.patience = asked.epochs, asked.patience
        self._status.write(self.run.status_file)
        logger.info(
            "attempt %d at %s: %s job %s on %s",
            self._record.number,
            self.run.name,
            self.job.cluster,
            self.job.job_id,
            self.job.host,
        )
        return self

    def progress(
        self, step: int, total_steps: int, epoch: int, best_val_loss: float | None
    ) -> None:
        """Note how far the run is; reaches the disk every few seconds and at the end."""
        if self._record.first_step is None:
            self._record.first_step = step
        self._record.last_step = step
        self._status.step, self._status.total_steps = step, total_steps
        self._status.epoch, self._status.best_val_loss = epoch, best_val_loss
        if time.monotonic() - self._written_at > STATUS_EVERY_S:
            self._status.write(self.run.status_file, flush=False)
            self._written_at = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:  # the lock is freed last
            outcome = outcome_of(error)
            self._record.ended = now()
            self._record.state = self._status.state = outcome.state
            self._record.reason = self._status.reason = outcome.reason
            self._status.exit_code = outcome.exit_code
            self._status.write(self.run.status_file)
