"""Rows that W&B has and that came out otherwise since: its server is asked to forget them.

Steps that a sudden death lost are repeated, and on another type of GPU or with changed code they
give other values. A server drops a row whose step it has, so it would keep those of the work that
was lost. What is asked for stands in the run's folder until it is done, by whoever opens the run
there next. Loads no wandb.
"""

import logging
from dataclasses import replace
from pathlib import Path

from flowjobs.errors import LoginError, ServerError, TrackingError
from flowjobs.runs.files import replaced_whole
from flowjobs.runs.run import Run
from flowjobs.tracking.server import RunAddress, Server

logger = logging.getLogger(__name__)


def ask_to_rewind(run: Run, step: int) -> None:
    """Note that the rows past a step are not the run's any more, where W&B has them."""
    before = asked_to_rewind(run)
    file = _file(run)
    file.parent.mkdir(exist_ok=True)
    with replaced_whole(file, flush=False) as noted:  # the training waits
        noted.write(str(step if before is None else min(step, before)).encode())


def asked_to_rewind(run: Run) -> int | None:
    """The step whose later rows are to go; None if there are none to go."""
    try:
        return int(_file(run).read_text())
    except (FileNotFoundError, ValueError):
        return None


def need_not_rewind(run: Run) -> None:
    """Take back what was asked for."""
    _file(run).unlink(missing_ok=True)


def rewind_as_asked(run: Run, server: Server, address: RunAddress) -> None:
    """Have the server forget the rows that are to go, if there are any.

    One that cannot keeps them, and the log says so: rewinding is a preview of W&B's own server,
    and others may lack it. The caller holds the `upload_lock`.

    Args:
        run: The run.
        server: Where it is.
        address: What it is called there.

    Raises:
        TrackingError: The server does not say what it has, or cannot be used now.
    """
    step = asked_to_rewind(run)
    if step is None:
        return
    there = server.run(address)
    if there.last_step > step:
        try:
            server.rewind(replace(address, entity=there.entity), step)
            logger.info("W&B forgets what it has past step %d: that came out otherwise", step)
        except (ServerError, LoginError):
            raise
        except TrackingError as error:
            logger.warning(
                "W&B keeps other values past step %d than %s has: it cannot rewind the run (%s)",
                step,
                run.metrics_file,
                error,
            )
    need_not_rewind(run)


def _file(run: Run) -> Path:
    return run.folder / "wandb" / "rewind_to"
