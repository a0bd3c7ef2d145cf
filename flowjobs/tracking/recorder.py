"""What a run says of itself while it trains: to `metrics.jsonl`, to its tracker, to its status."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flowjobs.runs.attempt import Attempt
from flowjobs.runs.metrics import MetricsFile
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.tracking.tracked import tracked
from flowjobs.tracking.tracker import Tracker


class Recorder:
    """The one outlet of a training loop; only the first rank has one."""

    def __init__(self, run: Run, attempt: Attempt, tracker: Tracker) -> None:
        self._run = run
        self._attempt = attempt
        self._tracker = tracker
        self._metrics: MetricsFile | None = None

    def go_on_after(self, step: int) -> None:
        """Say from which step the rows come; rows on disk past it are dropped."""
        self._metrics = MetricsFile(self._run.metrics_file, after_step=step)
        self._tracker.follow()

    def record(self, row: Mapping[str, Any]) -> None:
        """Record one row on disk, where it is safe and where the tracker finds it."""
        assert self._metrics is not None, "go_on_after comes first"
        self._metrics.append(row)

    def progress(
        self, step: int, total_steps: int, epoch: int, best_val_loss: float | None
    ) -> None:
        """Say how far the run is."""
        self._attempt.progress(step, total_steps, epoch, best_val_loss)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary in the tracker."""
        self._tracker.summarize(values)

    def close(self) -> None:
        """Close the metrics file."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


@contextmanager
def recording(run: Run, job: JobInfo) -> Iterator[Recorder]:
    """Hold the run and track it for as long as the block lasts.

    An exception in the block becomes the attempt's outcome, on disk and in the tracker.

    Raises:
        RunBusyError: Another attempt holds the run.
    """
    with Attempt(run, job) as attempt, tracked(run) as tracker:
        recorder = Recorder(run, attempt, tracker)
        try:
            yield recorder
        finally:
            recorder.close()
