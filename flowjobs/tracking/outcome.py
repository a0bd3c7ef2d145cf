"""`tracking.json`: the newest session of a run in W&B, what W&B knows of it, what it refuses.

Loads no wandb.
"""

import dataclasses
import json
import logging
import os
import re
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

# The server's own words, as wandb passes them on. It takes such an id never again; an answer of
# this kind (409) is one that wandb tries again all the same.
DELETED = "previously created and deleted"
RETRIED = re.compile("while retrying|timed? ?out|no answer", re.IGNORECASE)
LOGIN = re.compile(
    r"error 401|not logged in|unauthori[sz]ed|unauthenticated|api.key|bad key", re.IGNORECASE
)
PLACE = re.compile(
    "error 40[34]|permission|forbidden|access denied|not found|does not exist", re.IGNORECASE
)


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
        diverged_after: The step past which W&B may have rows of lost work that were other values.
    """

    attempt: int
    mode: Mode
    token: str
    summary: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None
    closed: bool = False
    diverged_after: int | None = None


@dataclass(frozen=True)
class Refusal:
    """Why W&B does not take a run: an answer, which trying again does not change.

    Attributes:
        text: What it said, and what can be done.
        kind: "deleted": its id is never taken again; "login": no run is taken; "place": this one.
    """

    text: str
    kind: Literal["deleted", "login", "place"]


def new_session(run: Run, mode: Mode) -> Session:
    """A session for the newest attempt of a run. Writes nothing."""
    status, before = run.status(), read_session(run)
    return Session(
        attempt=status.attempts[-1].number if status and status.attempts else 0,
        mode=mode,
        token=f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}",
        diverged_after=before.diverged_after if before else None,
    )


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
    # Not waited for: where a power loss takes it, the outcome is found in status.json.
    write_json(run.tracking_file, asdict(session), flush=False)


def note_closed(run: Run, token: str) -> None:
    """Note that W&B knows the outcome in `tracking.json`, if that is still the session's."""
    newest = read_session(run)
    if newest and newest.token == token and newest.outcome and not newest.closed:
        write_session(run, dataclasses.replace(newest, closed=True))


@contextmanager
def upload_lock(run: Run) -> Iterator[None]:
    """Hold what is told to W&B of a run: two at once would both send what it lacks.

    Raises:
        LockHeldError: Another process holds it, and has not let go of it in time.
    """
    folder = run.folder / "wandb"
    folder.mkdir(exist_ok=True)
    with locked(folder / ".upload.lock", UPLOAD_WAIT_S, f"to upload {run.name} to W&B"):
        yield


def refusal_of(said: str, run: Run) -> Refusal | None:
    """The refusal in what wandb or its server said; None if that may pass.

    wandb itself tries again what may pass (a network, a server that fails or is busy) and says so.
    Of what is left only the known answers count as refusals.
    """
    said = " ".join(said.split())
    if DELETED in said:
        return Refusal(
            "it was deleted in W&B, which never takes its id again: "
            f"`flowjobs sync {run.name} --as-new` uploads it as a new run there",
            "deleted",
        )
    if RETRIED.search(said):
        return None
    if LOGIN.search(said):
        return Refusal(
            f"W&B refuses the login here ({said}): run `wandb login --relogin` or mend "
            f"WANDB_API_KEY, then `flowjobs sync {run.name}`",
            "login",
        )
    if PLACE.search(said):
        tracking = run.config().tracking
        place = "/".join(filter(None, [tracking.wandb_entity, tracking.wandb_project]))
        return Refusal(
            f"W&B refuses it ({said}): see whether you may write to {place} there, or name "
            f"another place in {run.config_file}, then `flowjobs sync {run.name}`",
            "place",
        )
    return None


def note_refusal(run: Run, token: str, refusal: Refusal) -> None:
    """Keep in the run's folder what W&B said to a session."""
    # Not in tracking.json, which another process writes.
    write_json(run.refusal_file, {"token": token, **asdict(refusal)}, flush=False)


def current_refusal(run: Run) -> Refusal | None:
    """What keeps W&B from taking the run now; None if nothing is known to. Writes nothing."""
    session = read_session(run)
    if session is None or session.closed:
        return None
    try:
        found = json.loads(run.refusal_file.read_text())
        if found.pop("token") == session.token:  # each session is a new try
            return Refusal(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
