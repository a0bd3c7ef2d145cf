"""A run in Weights & Biases. Tracking never stops training: a failure is logged once."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import wandb

from flowjobs.config import config_to_dict
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome

logger = logging.getLogger(__name__)

# Room that W&B gives a run's notes on its page.
NOTES_CHARACTERS = 4000


class WandbTracker:
    """Mirrors a run to W&B, online or in offline files under the run's folder.

    Args:
        run: The run; its tracking id makes every attempt the same W&B run.
        mode: "online" or "offline".
    """

    def __init__(self, run: Run, mode: Literal["online", "offline"]) -> None:
        self._broken = False
        self._run: Any = None
        self._try("start", lambda: self._start(run, mode))

    def _start(self, run: Run, mode: Literal["online", "offline"]) -> None:
        config = run.config()
        # A stale service of a parent process would be joined instead of starting our own.
        os.environ.pop("WANDB_SERVICE", None)
        self._run = wandb.init(
            project=config.tracking.wandb_project,
            entity=config.tracking.wandb_entity,
            group=config.training.group,
            name=run.name,
            id=run.tracking_id(),
            config=config_to_dict(config.training),
            dir=run.folder,
            mode=mode,
            # An attempt goes on with the run that the one before it left.
            resume="allow",
            settings=wandb.Settings(
                # A hard kill loses what was not flushed: by default 15 s of everything.
                x_transaction_log_flush_interval=1,
                console="off",
                silent=True,
            ),
        )
        self._run.define_metric("train/loss", summary="min")
        self._run.define_metric("val/loss", summary="min")

    def log(self, row: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        values = {key: value for key, value in row.items() if key != "step"}
        # With commit the row is on record now; without, only when the next step is logged.
        self._try("log", lambda: self._run.log(values, step=row["step"], commit=True))

    def summarize(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._try("write the summary", lambda: self._run.summary.update(dict(values)))

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._try("finish", lambda: self._finish(outcome))

    def _finish(self, outcome: Outcome) -> None:
        match outcome.state:
            case "failed":
                self._run.tags = tuple({*(self._run.tags or ()), "failed"})
                self._run.notes = f"{outcome.reason}\n\n{outcome.traceback}"[:NOTES_CHARACTERS]
            case "preempted":
                self._run.mark_preempting()
        self._run.finish(exit_code=outcome.exit_code)

    def _try(self, what: str, action: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:
            self._broken = True
            logger.warning(
                "W&B could not %s (%s: %s); training goes on, metrics.jsonl has every row",
                what,
                type(error).__name__,
                error,
            )
