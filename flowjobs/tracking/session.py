"""`tracking.json`: the newest session of a run in W&B, and what W&B is still to be told of it."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flowjobs.runs.file_lock import locked
from flowjobs.runs.files import write_json
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline"]

# An upload that is under way may take so long.
UPLOAD_WAIT_S = 300.0
# Metrics whose lowest value a run is judged by.
LOWEST = ("train/loss", "val/loss")
# What the picture of a finished run is called beside the metrics.
PICTURE = "samples"


@dataclass(frozen=True)
class Session:
    """One attempt as W&B sees it.

    Attributes:
        attempt: The attempt's number.
        mode: Where its rows go: to the server, or to a file that is synced later.
        token: Tells sessions apart; the newest owns the run in W&B.
        summary: What the run's summary is to hold beside the last row.
        outcome: How the attempt ended; None while it runs, or if nobody knows yet.
        closed: Whether W&B knows the outcome, or its file does.
    """

    attempt: int
    mode: Mode
    token: str
    summary: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None
    closed: bool = False


@contextmanager
def upload_lock(run: Run) -> Iterator[None]:
    """Hold what is uploaded of a run to a server: two at once would both send what it lacks.

    Raises:
        LockHeldError: Another process holds it, and has not let go of it in time.
    """
    folder = run.folder / "wandb"
    folder.mkdir(exist_ok=True)
    with locked(folder / ".upload.lock", UPLOAD_WAIT_S, f"to upload {run.name} to W&B"):
        yield


def new_session(run: Run, mode: Mode) -> Session:
    """A session for the newest attempt of a run. Writes nothing."""
    status = run.status()
    attempt = status.attempts[-1].number if status and status.attempts else 0
    return Session(attempt, mode, f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}")


def read_session(run: Run) -> Session | None:
    """The newest session; None if there was none, or its file is damaged."""
    try:
        found: dict[str, Any] = json.loads(run.tracking_file.read_text())
        outcome = found.pop("outcome")
        return Session(**found, outcome=Outcome(**outcome) if outcome else None)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is damaged (%s)", run.tracking_file, error)
        return None


def write_session(run: Run, session: Session) -> None:
    """Make this the run's newest session, or note what became of it."""
    write_json(run.tracking_file, asdict(session), flush=False)
