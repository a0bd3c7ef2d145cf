"""What a run tells its tracker, and the tracker of a run that is not tracked."""

from collections.abc import Mapping
from typing import Any, Protocol

from flowjobs.runs.status import Outcome


class Tracker(Protocol):
    """Mirrors a run somewhere. None of its methods raises or waits for a network."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror one row of `metrics.jsonl`; `step` is among its keys."""
        ...

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary."""
        ...

    def finish(self, outcome: Outcome) -> None:
        """Close the attempt, and say how it ended."""
        ...


class NoTracker:
    """Tracks nothing."""

    def log(self, row: Mapping[str, Any]) -> None:
        """See `Tracker`."""

    def summarize(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
