"""Tells W&B how a run stands that nobody trains. Loads no wandb: the mirror does.

After a process that could not say how it ended: `close_session`. From a node that has internet:
`sync_run`, for which the mirror, run online, logs the rows of `metrics.jsonl` past the last step
that the server has, each with its own time, says the outcome that `status.json` gives, and asks the
server whether it has all. So it does not matter what W&B's own files hold, or where an upload was
cut: the next one asks the server again and continues from there.

A run that trains now is left for later as a whole: an upload ends with a state, and "running" is
none that it can end with. A run that waits for its next job is uploaded and shown as preempted,
also when its process was killed: whether that was the end is for others to find out.
"""

import json
import logging
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any, Literal

from flowjobs.errors import LoginError, ServerError, TrackingError
from flowjobs.runs.lock import Judge, lock_holder, system_lock_decides
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome, same_host
from flowjobs.tracking.mode import ResolvedMode, check_server_answers, resolve_mode, server_url
from flowjobs.tracking.process import start_mirror, upload_limit_s
from flowjobs.tracking.record import (
    OnRecord,
    Session,
    current_refusal,
    new_session,
    read_on_record,
    read_session,
    standing,
    upload_lock,
    write_on_record,
    write_session,
)

logger = logging.getLogger(__name__)

# How long a run that another node trains may write nothing, and still be taken to train.
QUIET_S = 600.0


def close_session(run: Run, *, wait: bool = True) -> bool:
    """Tell W&B how a run's newest attempt ended, as `status.json` has it, unless it knows.

    A run that never reached W&B (its start failed) gets a session that says so. Rows that W&B lacks
    are caught up from `metrics.jsonl`. Takes about a second, or a minute where a server does not
    answer; never raises because of W&B. Twice does no harm.

    The caller holds the run's lock, or knows that no attempt is alive.

    Args:
        run: The run.
        wait: Return when W&B knows; else a process that outlives this one for a while tells it.

    Returns:
        False if there was nothing to tell. True if there was: W&B knows it now, or it is the
        `pending_outcome` until it can be told.
    """
    before = read_session(run)
    mode: ResolvedMode = before.mode if before else resolve_mode(run.config().tracking)[0]
    if mode == "disabled" or _untold(run) is None:
        return False
    try:
        session = new_session(run, mode)
        write_session(run, session)
        mirror = start_mirror(run, session, "closes")
        if wait:
            wait_for_mirror(run, session, mirror, upload_limit_s(run))
    except OSError as error:
        logger.warning("W&B could not be told how %s ended: %s", run.name, error)
    return True


def pending_outcome(run: Run) -> Outcome | None:
    """What W&B is still to be told: `close_session` tells it.

    None where W&B refuses the run: `sync`, which its user asks for, tries again.
    """
    return None if current_refusal(run) else _untold(run)


def wait_for_mirror(
    run: Run, session: Session, mirror: subprocess.Popen[bytes], timeout_s: float
) -> None:
    """Wait until W&B knows how a session ended; end the mirror, and warn, if that takes longer."""
    try:
        code = mirror.wait(timeout_s)
    except subprocess.TimeoutExpired:
        mirror.kill()  # wandb's own process sees that and goes too
        code = mirror.wait()
    if mirror.stdin is not None:
        mirror.stdin.close()
    newest = read_session(run)
    if code == 0 or newest is None or newest.token != session.token:
        return  # told, or a later session tells
    refusal = current_refusal(run)
    what_to_do = refusal.text if refusal else f"`flowjobs sync {run.name}` tries again"
    state = run.status().state
    logger.warning("W&B does not know that %s is %s: %s", run.name, state, what_to_do)


def _untold(run: Run) -> Outcome | None:
    """How the run's newest attempt ended, if W&B is told of the run and does not know that."""
    mode, _ = resolve_mode(run.config().tracking)
    status = run.status()
    # A session is noted before a run trains: without one, WANDB_MODE kept W&B out there. Nor is it
    # told of a run without an attempt, which was cancelled before it began.
    trained = any(attempt.first_step is not None for attempt in status.attempts)
    untracked = read_session(run) is None and (trained or not status.attempts)
    if mode == "disabled" or untracked:
        return None
    told, stands = read_on_record(run).told, standing(run)
    known = all(told.get(key) == stands[key] for key in ("attempts", "outcome"))
    return None if known else status.outcome


@dataclass(frozen=True)
class Synced:
    """What a sync did for a run.

    Attributes:
        state: "uploaded"; "unchanged", for the server had all; "trains", and was left for later;
            "untracked", by its config or since it never started.
        rows: How many rows were sent.
        note: Who trains it, or "".
    """

    run: str
    state: Literal["uploaded", "unchanged", "trains", "untracked"]
    rows: int = 0
    note: str = ""


def sync_run(run: Run, judge: Judge = system_lock_decides) -> Synced:
    """Make the server have all of a run that does not train now; twice does no harm.

    Args:
        run: The run.
        judge: Says whether who is named as the run's holder still trains it.

    Raises:
        LoginError: The server refuses the key.
        ServerError: It cannot be used now, for any run.
        TrackingError: It does not have what was sent.
    """
    if run.config().tracking.wandb_mode == "disabled" or not run.tracking_file.exists():
        return Synced(run.name, "untracked")
    if trainer := _trainer_of(run, judge):
        return Synced(run.name, "trains", note=trainer)
    refusal = current_refusal(run)
    if refusal and refusal.kind == "deleted":
        raise TrackingError(refusal.text)
    with upload_lock(run):
        # Under the lock: another sync may have told it a moment ago.
        run.settle_tracking_id()
        if read_on_record(run).told == standing(run, server_url()):
            return Synced(run.name, "unchanged")
        session = read_session(run)
        if session is None:  # damaged
            session = new_session(run, "online")
            write_session(run, session)
        rows = _upload(run, session)
    return Synced(run.name, "unchanged" if rows is None else "uploaded", rows or 0)


def upload_as_new(run: Run, judge: Judge = system_lock_decides) -> None:
    """Have the next sync upload all of a run to a W&B run of its own.

    Raises:
        TrackingError: It trains now.
    """
    if trainer := _trainer_of(run, judge):
        raise TrackingError(f"{run.name} trains now ({trainer}): cancel it first")
    run.renew_tracking_id()
    with upload_lock(run):
        write_on_record(run, OnRecord(run.tracking_id()))


def _trainer_of(run: Run, judge: Judge) -> str | None:
    """Who trains the run, or seems to: not everywhere are locks of another node seen."""
    if holder := lock_holder(run.folder, judge):
        return holder
    attempt = run.status().open_attempt
    if attempt is None or same_host(attempt.job.host, socket.gethostname()):
        return None
    files = [path for path in (run.metrics_file, run.status_file) if path.exists()]
    written = max((path.stat().st_mtime for path in files), default=0.0)
    return attempt.job.words if time.time() - written < QUIET_S else None


def _upload(run: Run, session: Session) -> int | None:
    """Have the mirror upload what is missing. Returns how many rows; None if nothing was.

    Raises:
        TrackingError: It could not; see `sync_run`.
    """
    # Here, before a second is spent on loading wandb for each of a hundred runs.
    check_server_answers()
    with start_mirror(run, session, "syncs") as mirror:
        try:
            output, _ = mirror.communicate(timeout=upload_limit_s(run))
        except subprocess.TimeoutExpired:
            mirror.kill()
            output, _ = mirror.communicate()
        finally:
            mirror.kill()  # Ctrl-C is for us alone
    news: dict[str, Any] = {}
    for line in output.splitlines():
        news |= json.loads(line)
    if mirror.returncode == 0:
        return news.get("uploaded")
    if "failure" in news:
        kind = {"login": LoginError, "server": ServerError}.get(news["kind"], TrackingError)
        raise kind(f"{news['failure']}; sync again")
    raise TrackingError(
        "the server has not taken all of it in time; sync again, it continues from what is there "
        f"({run.folder / 'wandb' / 'mirror.log'})"
    )
