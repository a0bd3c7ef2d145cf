"""What is kept of a run in W&B: its newest session, and what W&B has of it. Loads no wandb.

`tracking.json` is written by who begins a session, `on_record.json` by who holds the `upload_lock`.
How an attempt ended stands in `status.json`; `on_record.json` has what of that was reported to W&B.

An offline session is a folder of its own. `wandb sync` uploads them one after another and numbers
a row anew whose step it has seen before, so no two may hold the same step. So only sessions that
were closed, and are whole on the disk, count: the next one logs the rows past them. Any other (cut
by a kill, online, of the run that this one was copied from) is marked as synced already, and its
rows are logged again.
"""

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from flowjobs.config import TrackingConfig
from flowjobs.errors import ConfigError, ServerError
from flowjobs.from_json import from_json
from flowjobs.runs.file_lock import locked
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.hint import hint, program
from flowjobs.runs.metrics import latest_values
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome
from flowjobs.tracking.mode import ResolvedMode, has_login, server_of

logger = logging.getLogger(__name__)

# An upload that is under way may take so long.
UPLOAD_WAIT_S = 300.0

# The server's own words, as wandb passes them on. It takes such an id again only where the run
# is undeleted; an answer of this kind (409) is one that wandb tries again all the same.
DELETED = "previously created and deleted"
# What may pass: what wandb has tried again, and the words of this machine, by Python and by Go, the
# language of wandb's own process: a file that may not be written also is "permission denied".
NO_REFUSAL = re.compile(
    r"while retrying|timed? ?out|no answer|error 429|rate limit|\[Errno|file not found|\bdial \w+"
    r"|\b(open|mkdir|l?stat|rename|remove|fork/exec) \S+: ",
    re.IGNORECASE,
)
LOGIN = re.compile(
    r"error 401|not logged in|unauthori[sz]ed|unauthenticated|api.key|bad key", re.IGNORECASE
)
# For an answer 400 (a name that is too long), wandb passes on the server's words alone.
PLACE = re.compile(
    r"error 4(0[0234]|13|22)|permission|forbidden|access denied|not found|does not exist"
    r"|invalid (parameter|tag)|limit exceeded|cannot exceed",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Session:
    """A session as it was begun.

    Attributes:
        mode: Where its rows go: to the server, or to a file that is synced later.
        token: Tells sessions apart; the newest owns the run in W&B.
    """

    mode: ResolvedMode
    token: str


@dataclass(frozen=True)
class Refusal:
    """Why W&B does not take a run: an answer, which trying again does not change.

    Attributes:
        text: What it said, and what can be done.
        kind: "deleted": it was, there; "login": no run is taken; "place": this one.
    """

    text: str
    kind: Literal["deleted", "login", "place"]


@dataclass(frozen=True)
class Report:
    """The state of a run, as far as W&B is told of it.

    Attributes:
        attempts: How many attempts have begun.
        outcome: How the newest one ended; None if nobody has said so yet.
        rows: Size and time of `metrics.jsonl`; empty without one.
        evaluation: The same of `evaluation.json`.
        server: The one that has all of it; "" if none has.
    """

    attempts: int = 0
    outcome: Outcome | None = None
    rows: tuple[int, ...] = ()
    evaluation: tuple[int, ...] = ()
    server: str = ""


@dataclass(frozen=True)
class Uploaded:
    """What W&B, or the folders that are for it, have of a run.

    Attributes:
        run_id: The run's id in W&B.
        step: The last step of it all; -1 without rows.
        folders: Names of the folders that hold it, as far as no server does.
        reported: The state that W&B was told last; None if it was told none.
        refusal: Why W&B does not take the run.
        named: The server, entity and project that have it, and the name and group that it was
            given there once: its user may change them.
    """

    run_id: str
    step: int = -1
    folders: tuple[str, ...] = ()
    reported: Report | None = None
    refusal: Refusal | None = None
    named: tuple[str, ...] = ()


def read_session(run: Run) -> Session | None:
    """The newest session; None if there was none, or its file is damaged."""
    try:
        return from_json(Session, read_json(run.tracking_file))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged (%s)", run.tracking_file, error)
        return None


def begin_session(run: Run, mode: ResolvedMode) -> Session:
    """Make a new session the run's newest: a process that mirrors another one stops."""
    session = Session(mode, f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}")
    # Not waited for: what W&B is to be told of an end is in status.json.
    write_json(run.tracking_file, asdict(session), flush=False)
    return session


def is_superseded(run: Run, session: Session) -> bool:
    """Whether a later session, as of another attempt, owns the run in W&B now."""
    newest = read_session(run)
    return newest is not None and newest.token != session.token


@contextmanager
def upload_lock(run: Run) -> Iterator[None]:
    """Hold what is told to W&B of a run: two at once would both send what it lacks.

    Raises:
        LockHeldError: Another process holds it, and has not let go of it in time.
    """
    run.wandb_folder.mkdir(exist_ok=True)
    with locked(run.wandb_folder / ".upload.lock", UPLOAD_WAIT_S, f"to upload {run.name} to W&B"):
        yield


def state_to_report(run: Run, server: str = "") -> Report:
    """The state of the run now; `server` is the one that has all of it."""
    status = run.status()
    if status.updated:
        found = Report(len(status.attempts), status.outcome)
    else:  # missing or damaged: what was reported is all that is known
        found = read_uploaded(run).reported or Report()
    rows, evaluation = _version_of(run.metrics_file), _version_of(run.evaluation_file)
    return replace(found, rows=rows, evaluation=evaluation, server=server)


def _version_of(file: Path) -> tuple[int, ...]:
    if not file.exists():
        return ()
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def read_uploaded(run: Run) -> Uploaded:
    """What W&B has of a run under its id; nothing if that is not noted."""
    run_id = ""
    with suppress(ConfigError, OSError, ValueError):
        run_id = run.tracking_id()
        found = from_json(Uploaded, read_json(run.on_record_file))
        if found.run_id == run_id:
            return found
    return Uploaded(run_id)


def write_uploaded(run: Run, uploaded: Uploaded) -> None:
    """Note it, and keep a plain `wandb sync` from all folders that have nothing for it.

    The caller holds the `upload_lock`, as for all that is noted there.
    """
    for path in session_files(run):
        if path.parent.name not in uploaded.folders:
            path.with_name(f"{path.name}.synced").touch()  # as wandb marks what it has uploaded
    write_json(run.on_record_file, asdict(uploaded), flush=False)


def note_reported(run: Run, reported: Report) -> None:
    """Note that W&B knows this state of the run."""
    uploaded = replace(read_uploaded(run), reported=reported, refusal=None)
    if reported.server:  # a plain `wandb sync` has nothing to do any more
        last_step = max(uploaded.step, last_step_of(run))
        uploaded = replace(uploaded, step=last_step, folders=())
    write_uploaded(run, uploaded)


def note_refusal(run: Run, refusal: Refusal | None) -> None:
    """Note what keeps W&B from taking the run; None: it is to be tried again."""
    uploaded = read_uploaded(run)
    if uploaded.refusal != refusal:
        write_uploaded(run, replace(uploaded, refusal=refusal))


def tracking_of(run: Run) -> TrackingConfig:
    """How the run is tracked; where its config names no server, at the one that has it.

    Another project's WANDB_BASE_URL, left over in a shell, does not move a run that is under way.
    """
    tracking = run.config().tracking
    there, *_ = read_uploaded(run).named or ("",)
    return replace(tracking, wandb_base_url=tracking.wandb_base_url or there or None)


def entity_of(run: Run) -> str:
    """W&B entity of the run; "" until its first session, which then uses the key's default entity.

    Fixed from then on, whoever syncs.
    """
    tracking = tracking_of(run)
    server, entity, *_ = read_uploaded(run).named or ("", "")
    return tracking.wandb_entity or (entity if server == server_of(tracking) else "")


def session_files(run: Run) -> list[Path]:
    """W&B's files of all sessions of a run."""
    return list(run.wandb_folder.glob("*run-*/run-*.wandb"))


def last_step_of(run: Run) -> int:
    """The step of the run's last row; -1 without rows."""
    return int(latest_values(run.metrics_file).get("step", -1))


def refusal_of(error: Exception, run: Run) -> Refusal | None:
    """The refusal in what wandb or its server said; None if that may pass.

    wandb itself tries again what may pass (a network, a server that fails or is busy) and says so.
    Of what is left only the known answers of a server count as refusals.
    """
    said = " ".join(str(error).split())
    sync = hint("sync", run.name, study=run.study)
    if DELETED in said:
        as_new = hint("sync", run.name, "--as-new", study=run.study)
        return Refusal(
            f"it was deleted in W&B: undelete it there within 7 days and `{sync}`, or `{as_new}` "
            "uploads it as a new run",
            "deleted",
        )
    of_the_system = isinstance(error, OSError) and error.errno is not None
    if of_the_system or isinstance(error, ServerError) or NO_REFUSAL.search(said):
        return None
    tracking = tracking_of(run)
    if LOGIN.search(said):
        if not has_login(server_of(tracking)):  # another node, or user, may have one
            return None
        return Refusal(
            f"W&B refuses the login here ({said}): run `{program('wandb')} login --relogin` or "
            f"mend WANDB_API_KEY, then `{sync}`",
            "login",
        )
    if PLACE.search(said):
        return Refusal(
            f"W&B refuses it ({said}): see whether you may write to {tracking.place} there, "
            f"or mend what it names in {run.config_file}, then `{sync}`",
            "place",
        )
    return None
