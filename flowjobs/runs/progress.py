"""How far a run is, as seen from outside: its status with what its newest rows add to it."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from flowjobs.runs.metrics import Row, epochs_without_improvement, latest_values
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus, read_sound_status

# To compile a model, to solve a chunk of pairs or to validate takes minutes, and the clocks of two
# hosts may differ by some.
SILENT_AT_MOST_S = 1800.0


def current_progress(run: Run) -> tuple[RunStatus, Row]:
    """The status, and the newest value of each key in `metrics.jsonl`.

    Rows reach the disk at once and `status.json` every few seconds: where both tell a thing, the
    newer counts, so that no best loss is shown that is worse than the loss beside it.

    Raises:
        ConfigError: The status is damaged.
    """
    status, latest = read_sound_status(run.status_file), latest_values(run.metrics_file)
    losses = (status.best_val_loss, latest.get("val/best_loss"))
    return replace(
        status,
        step=max(status.step, latest.get("step", 0)),
        epoch=max(status.epoch, latest.get("epoch", 0)),
        best_val_loss=min((loss for loss in losses if loss is not None), default=None),
    ), latest


def steps_per_s(status: RunStatus) -> float | None:
    """How fast the newest attempt trains, its start included; None if that cannot be told yet."""
    if not status.attempts or status.attempts[-1].first_step is None:
        return None
    newest = status.attempts[-1]
    end = datetime.fromisoformat(newest.ended or status.updated)
    took_s = (end - datetime.fromisoformat(newest.started)).total_seconds()
    done = (newest.last_step or 0) - (newest.first_step or 0)
    return done / took_s if done > 0 and took_s >= 1 else None


def time_left_s(status: RunStatus) -> float | None:
    """How long a run that trains will take at most; None if that cannot be told, or it does not."""
    speed = steps_per_s(status)
    if status.state != "running" or speed is None or status.total_steps is None:
        return None
    return max(0, status.total_steps - status.step) / speed


def silent_s(status: RunStatus, metrics_file: Path) -> float | None:
    """How long nothing has been heard of a run that trains; None where that is not too long.

    Nor is anything heard while samples are drawn and measured, after the last step.
    """
    # The status is written every few seconds: by its own step it may be short of the end for ever.
    last = status.attempts[-1].last_step if status.attempts else None
    done = status.total_steps is not None and (last or 0) >= status.total_steps
    if done or state_in_words(status) != "running":
        return None
    heard = datetime.fromisoformat(status.heard(metrics_file))
    silent = (datetime.now(UTC) - heard).total_seconds()
    if silent <= SILENT_AT_MOST_S:
        return None
    done_early = status.patience and epochs_without_improvement(metrics_file) >= status.patience
    return None if done_early else silent


def state_in_words(status: RunStatus) -> str:
    """The state, as a user calls it.

    A run whose steps are done is not at its end until its samples are drawn, and Ctrl-C is no
    preemption, though both are resumed alike.
    """
    done = status.total_steps is not None and status.step >= status.total_steps
    if status.state == "running" and done:
        return "drawing samples"
    if status.state == "preempted" and status.reason.startswith("interrupted"):
        return "interrupted"
    return status.state
