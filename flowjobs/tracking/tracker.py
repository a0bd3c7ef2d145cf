"""What a run tells its tracker, and the tracker of a run that is not tracked."""

from collections.abc import Mapping
from typing import Any, Protocol

from flowjobs.runs.status import Outcome


class Tracker(Protocol):
    """Mirrors a run's `metrics.jsonl` somewhere.

    None of its methods raises, and none but `finish` waits.
    """

    def follow(self) -> None:
        """From now on `metrics.jsonl` holds only rows that count, and those that come."""
        ...

    def last_row_comes(self) -> None:
        """The next row is the run's last: its picture belongs into it."""
        ...

    def comes_out_otherwise(self, step: int) -> None:
        """The rows that come past a step are others than those of the attempt before."""
        ...

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary."""
        ...

    def finish(self, outcome: Outcome) -> None:
        """Close the attempt, and say how it ended; waits for a few seconds at most."""
        ...


class NoTracker:
    """Tracks nothing."""

    def follow(self) -> None:
        """See `Tracker`."""

    def last_row_comes(self) -> None:
        """See `Tracker`."""

    def comes_out_otherwise(self, step: int) -> None:
        """See `Tracker`."""

    def summarize(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
