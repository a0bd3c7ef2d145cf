"""The trainer as a notebook uses it: it opens its run itself, and W&B mirrors it."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

from flowjobs.config import TrackingConfig, WandbMode
from flowjobs.runs.run import Run
from flowjobs.tracking.mode import entity_here, mode_of_settings, mode_of_variable, variables
from flowjobs.tracking.tracker import tracked
from flowjobs.training.trainer import Trainer


class FlowTrainer(Trainer):
    """A `Trainer` whose run is tracked in W&B as its job would be."""

    def track(self, run: Run) -> AbstractContextManager[object]:
        """In W&B."""
        return tracked(run)

    def tracking(self) -> TrackingConfig:
        """As it was asked for; else as W&B's own variables and settings here have it."""
        asked = super().tracking()
        mode = mode_of_variable() or mode_of_settings()[0] or asked.wandb_mode
        return replace(
            asked,
            wandb_entity=asked.wandb_entity or entity_here(),
            wandb_base_url=variables().get("WANDB_BASE_URL"),
            wandb_mode=cast(WandbMode, mode),
        )
