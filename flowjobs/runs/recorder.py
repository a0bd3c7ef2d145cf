"""What a run records while it trains: to `metrics.jsonl` and to its status."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from flowjobs.runs.attempt import Attempt, died_silently
from flowjobs.runs.extending import Extension
from flowjobs.runs.lock import Judge, system_lock_decides
from flowjobs.runs.metrics import MetricsFile
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, outcome_of

# Mirrors a run while the block lasts; the outcome is on disk before that ends. The rows of
# `metrics.jsonl` count from when `status.json` says that the newest attempt trains.
Track = Callable[[Run], AbstractContextManager[object]]


class Recorder:
    """The one outlet of a training loop; only the first rank has one.

    Attributes:
        attempt: What the status says of it, and whether it still holds the run.
    """

    def __init__(self, run: Run, attempt: Attempt) -> None:
        self._run = run
        self.attempt = attempt
        self._metrics: MetricsFile | None = None

    def start_at(
        self,
        step: int,
        extensions: Sequence[Extension] = (),
        rows_up_to: int | None = None,
    ) -> None:
        """Say from which step the rows come; rows on disk past it are dropped.

        Args:
            step: The step that the attempt starts at.
            extensions: When the run was given more epochs or patience.
            rows_up_to: The last step whose row is kept, if that is another one.
        """
        self.attempt.start_at(step, extensions)
        kept = step if rows_up_to is None else rows_up_to
        self._metrics = MetricsFile(self._run.metrics_file, after_step=kept)
        self.attempt.trains_now()

    def record(self, row: Mapping[str, Any]) -> None:
        """Record one row on disk, where it is safe and where the mirror finds it."""
        assert self._metrics is not None, "start_at comes first"
        last_same = self._metrics.notice_other_values(row)
        if last_same is not None:
            self.attempt.note_divergence(last_same)
            self._metrics.forget_lost()
        self._metrics.append(row)

    def flush_rows(self) -> None:
        """Return when every row is on the disk, or raise an OSError."""
        if self._metrics is not None:
            self._metrics.flush()

    def record_outcome(self, outcome: Outcome) -> None:
        """Close the metrics file, and say on disk how the attempt ended: W&B may take longer."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self.attempt.record_outcome(outcome)


@contextmanager
def recording(
    run: Run,
    job: JobInfo,
    judge: Judge = system_lock_decides,
    explain: Callable[[AttemptRecord], Outcome] = died_silently,
    track: Track = nullcontext,
) -> Iterator[Recorder]:
    """Hold the run and track it for as long as the block lasts.

    An exception in the block becomes the attempt's outcome, on disk and where it is tracked.

    Args:
        run: See `Attempt`, as for `job`, `judge` and `explain`.
        track: Mirrors the run.

    Raises:
        RunBusyError: Another attempt holds the run.
    """
    with Attempt(run, job, judge, explain) as attempt, track(run):
        recorder = Recorder(run, attempt)
        try:
            yield recorder
        except BaseException as error:
            recorder.record_outcome(outcome_of(error))
            raise
        recorder.record_outcome(outcome_of(None))
