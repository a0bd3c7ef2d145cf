"""What a run records while it trains: to `metrics.jsonl`, to its status, and to its tracker."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from flowjobs.runs.attempt import Attempt, died_silently
from flowjobs.runs.lock import Judge, system_lock_decides
from flowjobs.runs.metrics import MetricsFile
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, outcome_of


class Tracker(Protocol):
    """Mirrors a run's `metrics.jsonl` somewhere. None of its methods raises or waits."""

    def start_mirroring(self) -> None:
        """From now on `metrics.jsonl` holds only rows that count, and those that come."""
        ...

    def last_row_comes(self) -> None:
        """The next row is the run's last: its picture belongs into it."""
        ...


# Opens the tracker of a run's newest attempt; its outcome is on disk before the block ends.
Track = Callable[[Run], AbstractContextManager[Tracker]]


class Untracked:
    """The tracker of a run that is not mirrored anywhere."""

    def start_mirroring(self) -> None:
        """See `Tracker`."""

    def last_row_comes(self) -> None:
        """See `Tracker`."""


@contextmanager
def untracked(run: Run) -> Iterator[Tracker]:
    """Track nothing."""
    yield Untracked()


class Recorder:
    """The one outlet of a training loop; only the first rank has one.

    Attributes:
        attempt: What the status says of it, and whether it still holds the run.
    """

    def __init__(self, run: Run, attempt: Attempt, tracker: Tracker) -> None:
        self._run = run
        self.attempt = attempt
        self._tracker = tracker
        self._metrics: MetricsFile | None = None

    def note_model(self, model: str, parameters: int, flops_per_sample: int | None) -> None:
        """Say which model it is, and how large, before `start_at`; see `RunStatus`."""
        self.attempt.note_model(model, parameters, flops_per_sample)

    def start_at(
        self,
        step: int,
        extensions: Sequence[Mapping[str, Any]] = (),
        rows_up_to: int | None = None,
    ) -> None:
        """Say from which step the rows come; rows on disk past it are dropped.

        Args:
            step: The step that the attempt starts at.
            extensions: When the run was given more epochs or patience.
            rows_up_to: The last step whose row is kept, if that is another one.
        """
        self.attempt.start_at(step, [dict(extension) for extension in extensions])
        kept = step if rows_up_to is None else rows_up_to
        self._metrics = MetricsFile(self._run.metrics_file, after_step=kept)
        self._tracker.start_mirroring()

    def record(self, row: Mapping[str, Any], *, is_last: bool = False) -> None:
        """Record one row on disk, where it is safe and where the tracker finds it."""
        assert self._metrics is not None, "start_at comes first"
        last_same = self._metrics.notice_other_values(row)
        if last_same is not None:
            self.attempt.note_divergence(last_same)
            self._metrics.forget_lost()
        if is_last:
            self._tracker.last_row_comes()
        self._metrics.append(row)

    def flush_rows(self) -> None:
        """Return when every row is on the disk, or raise an OSError."""
        if self._metrics is not None:
            self._metrics.flush()

    def close(self, outcome: Outcome) -> None:
        """Close the metrics file, and say on disk how the attempt ended: W&B may take longer."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self.attempt.close(outcome)


@contextmanager
def recording(
    run: Run,
    job: JobInfo,
    judge: Judge = system_lock_decides,
    explain: Callable[[AttemptRecord], Outcome] = died_silently,
    track: Track = untracked,
) -> Iterator[Recorder]:
    """Hold the run and track it for as long as the block lasts.

    An exception in the block becomes the attempt's outcome, on disk and in the tracker.

    Args:
        run: See `Attempt`, as for `job`, `judge` and `explain`.
        track: Opens the run's tracker.

    Raises:
        RunBusyError: Another attempt holds the run.
    """
    with Attempt(run, job, judge, explain) as attempt, track(run) as tracker:
        recorder = Recorder(run, attempt, tracker)
        try:
            yield recorder
        except BaseException as error:
            recorder.close(outcome_of(error))
            raise
        recorder.close(outcome_of(None))
