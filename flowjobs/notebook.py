"""The trainer as a notebook uses it: it opens its run itself, and W&B mirrors it."""

from contextlib import AbstractContextManager

from flowjobs.runs.recorder import Tracker
from flowjobs.runs.run import Run
from flowjobs.tracking.tracker import tracked
from flowjobs.training import trainer


class FlowTrainer(trainer.FlowTrainer):
    """A `flowjobs.training.trainer.FlowTrainer` whose run is tracked in W&B as its job would be."""

    def track(self, run: Run) -> AbstractContextManager[Tracker]:
        """W&B's tracker."""
        return tracked(run)
