"""What is kept of a run in W&B: its newest session, and what W&B has of it. Loads no wandb.

`tracking.json` is written by who begins a session, `on_record.json` by who holds the `upload_lock`.
How an attempt ended stands in neither but in `status.json`; on record is what of that was told.

An offline session is a folder of its own. `wandb sync` uploads them one after another and numbers
a row anew whose step it has seen before, so no two may hold the same step. So only sessions that
were closed, and are whole on the disk, count: the next one logs the rows past them. Any other (cut
by a kill, online, of the run that this one was copied from) is left out, and its rows come again.
"""

import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flowjobs.errors import ConfigError
from flowjobs.from_json import from_json
from flowjobs.runs.file_lock import locked
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.metrics import latest_values
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
    """A session as it was begun.

    Attributes:
        mode: Where its rows go: to the server, or to a file that is synced later.
        token: Tells sessions apart; the newest owns the run in W&B.
        summary: What the run's summary is to hold beside the last row.
        diverged_after: The step past which W&B may have rows of lost work that were other values.
    """

    mode: Mode
    token: str
    summary: dict[str, Any] = field(default_factory=dict)
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


@dataclass(frozen=True)
class OnRecord:
    """What W&B, or the folders that are for it, have of a run.

    Attributes:
        run_id: The run's id in W&B.
        step: The last step of it all; -1 without rows.
        folders: Names of the folders that hold it, as far as no server does.
        told: How the run stood when W&B was last told; see `standing`.
        refusal: Why W&B does not take it.
    """

    run_id: str
    step: int = -1
    folders: tuple[str, ...] = ()
    told: dict[str, Any] = field(default_factory=dict)
    refusal: Refusal | None = None


def new_session(run: Run, mode: Mode) -> Session:
    """A session that goes on with what is known of the one before. Writes nothing."""
    token = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    return replace(read_session(run) or Session(mode, token), mode=mode, token=token)


def read_session(run: Run) -> Session | None:
    """The newest session; None if there was none, or its file is damaged."""
    try:
        return from_json(Session, read_json(run.tracking_file))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged (%s)", run.tracking_file, error)
        return None


def write_session(run: Run, session: Session) -> None:
    """Make this the run's newest session: a process that mirrors another one stops."""
    # Not waited for: what W&B is to be told of an end is in status.json.
    write_json(run.tracking_file, asdict(session), flush=False)


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


def standing(run: Run, server: str = "") -> dict[str, Any]:
    """How the run stands, as far as W&B is told of it; `server` is the one that has all of it."""
    status = run.status()
    if status.updated:
        attempts, outcome = len(status.attempts), status.outcome and asdict(status.outcome)
    else:  # missing or damaged: what was told is all that is known
        told = read_on_record(run).told
        attempts, outcome = told.get("attempts", 0), told.get("outcome")
    rows = run.metrics_file.stat() if run.metrics_file.exists() else None
    return {
        "attempts": attempts,
        "outcome": outcome,
        "rows": [rows.st_size, rows.st_mtime_ns] if rows else None,
        "server": server,
    }


def outcome_in(stands: Mapping[str, Any]) -> Outcome | None:
    """How the newest attempt of a run that stands so ended; None if nobody has said so yet."""
    return from_json(Outcome, stands["outcome"]) if stands["outcome"] else None


def read_on_record(run: Run) -> OnRecord:
    """What is on record of a run under its id; nothing if that is not noted."""
    run_id = ""
    with suppress(ConfigError, OSError, ValueError):
        run_id = run.tracking_id()
        found = from_json(OnRecord, read_json(_on_record_file(run)))
        if found.run_id == run_id:
            return found
    return OnRecord(run_id)


def write_on_record(run: Run, on_record: OnRecord) -> None:
    """Note it. The caller holds the `upload_lock`, as for all that is noted there."""
    write_json(_on_record_file(run), asdict(on_record), flush=False)


def note_told(run: Run, told: dict[str, Any]) -> None:
    """Note that W&B knows how the run stands."""
    on_record = replace(read_on_record(run), told=told, refusal=None)
    if told["server"]:  # a plain `wandb sync` has nothing to do any more
        last_step = max(on_record.step, last_step_of(run))
        on_record = replace(on_record, step=last_step, folders=())
        leave_out_others(run, on_record)
    write_on_record(run, on_record)


def note_refusal(run: Run, refusal: Refusal | None) -> None:
    """Note what keeps W&B from taking the run; None: it is to be tried again."""
    on_record = read_on_record(run)
    if on_record.refusal != refusal:
        write_on_record(run, replace(on_record, refusal=refusal))


def leave_out_others(run: Run, on_record: OnRecord) -> None:
    """Keep a plain `wandb sync` from the folders that hold nothing on record."""
    for path in session_files(run):
        if path.parent.name not in on_record.folders:
            path.with_name(f"{path.name}.synced").touch()  # as wandb marks what it has uploaded


def session_files(run: Run) -> list[Path]:
    """W&B's files of all sessions of a run."""
    return list(run.folder.glob("wandb/*run-*/run-*.wandb"))


def last_step_of(run: Run) -> int:
    """The step of the run's last row; -1 without rows."""
    return int(latest_values(run.metrics_file).get("step", -1))


def current_refusal(run: Run) -> Refusal | None:
    """What keeps W&B from taking the run, until a session of it opens. Writes nothing."""
    return read_on_record(run).refusal


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


def _on_record_file(run: Run) -> Path:
    return run.folder / "wandb" / "on_record.json"
