"""Opens the tracker of an attempt and closes it with the attempt's outcome."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from flowjobs.errors import RunTakenOverError
from flowjobs.runs.run import Run
from flowjobs.runs.status import outcome_of
from flowjobs.tracking.mode import resolve_mode
from flowjobs.tracking.tracker import NoTracker, Tracker
from flowjobs.tracking.wandb_tracker import WandbTracker

logger = logging.getLogger(__name__)


@contextmanager
def tracked(run: Run) -> Iterator[Tracker]:
    """A tracker for as long as the block lasts; an exception in it is the run's outcome."""
    mode, why = resolve_mode(run.config().tracking)
    logger.info("W&B: %s (%s)", mode, why)
    tracker: Tracker = NoTracker() if mode == "disabled" else WandbTracker(run, mode)
    try:
        yield tracker
    except RunTakenOverError:
        raise  # its end is not the run's
    except BaseException as error:
        tracker.finish(outcome_of(error))
        raise
    tracker.finish(outcome_of(None))
