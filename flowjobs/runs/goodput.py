"""Where the time of a run went, from the times that its record has."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from flowjobs.runs.status import AttemptRecord, RunStatus
from flowjobs.runs.submittable import Submission


@dataclass(frozen=True)
class TimeSpent:
    """Seconds of a run's life.

    Attributes:
        waiting_s: In the queue: before its first attempt, and between attempts.
        starting_s: From the start of an attempt until its first step.
        repeated_s: On steps that a death lost, and that were done again.
        saving_s: On checkpoints, as far as training stood still for them.
        progress_s: On steps that count, with validating.
    """

    waiting_s: float = 0.0
    starting_s: float = 0.0
    repeated_s: float = 0.0
    saving_s: float = 0.0
    progress_s: float = 0.0

    @property
    def held_s(self) -> float:
        """How long it held its GPUs."""
        return self.starting_s + self.repeated_s + self.saving_s + self.progress_s

    @property
    def goodput(self) -> float | None:
        """The share of the GPUs' time that became progress; None before there was any."""
        return self.progress_s / self.held_s if self.held_s else None


def time_spent(status: RunStatus, submissions: Sequence[Submission]) -> TimeSpent:
    """Where the time of a run went until now, or until it ended.

    Args:
        status: The run's; of an attempt that was noted without the time of its first step, all
            counts as training.
        submissions: Its jobs.
    """
    attempts = status.attempts
    if not attempts:
        return TimeSpent()
    submitted = min((_time(entry.submitted) for entry in submissions), default=None)
    first = _time(attempts[0].started)
    waiting = max(0.0, (first - submitted).total_seconds()) if submitted else 0.0
    for one, other in pairwise(attempts):
        waiting += max(0.0, (_time(other.started) - _end_of(one)).total_seconds())
    starting = repeated = saving = progress = 0.0
    for attempt, following in zip(attempts, [*attempts[1:], None], strict=True):
        begin, end = _time(attempt.started), _end_of(attempt)
        trains = min(_time(attempt.trains), end) if attempt.trains else begin
        if attempt.first_step is None:  # it did not come so far
            trains = end
        starting += (trains - begin).total_seconds()
        training_s = (end - trains).total_seconds()
        saved = min(attempt.saving_s, training_s)
        saving += saved
        trained = training_s - saved
        lost = _lost_share(attempt, following)
        repeated += lost * trained
        progress += (1 - lost) * trained
    return TimeSpent(waiting, starting, repeated, saving, progress)


def _lost_share(attempt: AttemptRecord, following: AttemptRecord | None) -> float:
    """The share of an attempt's steps that the next one did again."""
    if following is None or following.first_step is None:
        return 0.0
    done = (attempt.last_step or 0) - (attempt.first_step or 0)
    lost = (attempt.last_step or 0) - following.first_step
    return min(1.0, max(0, lost) / done) if done > 0 else 0.0


def _end_of(attempt: AttemptRecord) -> datetime:
    return _time(attempt.ended) if attempt.ended else datetime.now(UTC)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
