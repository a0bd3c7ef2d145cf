"""Brings a run to the W&B server from a node that has internet, each logged step exactly once.

The mirror, run online over a run that nobody trains, logs the rows of `metrics.jsonl` past the last
step that the server has, each with its own time, says the outcome that `status.json` gives, and
asks the server whether it has all. So it does not matter what W&B's own files hold, or where an
upload was cut: the next one asks the server again and continues from there.

A run that trains now is left for later as a whole: an upload ends with a state, and "running" is
none that it can end with. A run that waits for its next job is uploaded and shown as preempted,
also when its process was killed: whether that was the end is for others to find out.
"""

import json
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flowjobs.errors import LoginError, ServerError, TrackingError
from flowjobs.runs.lock import Judge, lock_holder, system_lock_decides
from flowjobs.runs.metrics import latest_values
from flowjobs.runs.run import Run
from flowjobs.runs.status import same_host
from flowjobs.tracking.folders import (
    OnRecord,
    leave_out_others,
    read_on_record,
    write_on_record,
)
from flowjobs.tracking.mode import check_server_answers, server_url
from flowjobs.tracking.outcome import (
    Session,
    current_refusal,
    new_session,
    note_closed,
    read_session,
    upload_lock,
    write_session,
)
from flowjobs.tracking.process import start_mirror, upload_limit_s

# How long a run that another node trains may write nothing, and still be taken to train.
QUIET_S = 600.0


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


def sync_run(
    run: Run,
    *,
    judge: Judge = system_lock_decides,
    limit_s: float | None = None,
) -> Synced:
    """Make the server have all of a run that does not train now; twice does no harm.

    Args:
        run: The run.
        judge: Says whether who is named as the run's holder still trains it.
        limit_s: How long it may take; by default more for a run of many rows.

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
        before = read_on_record(run, run.settle_tracking_id())
        told = _to_tell(run)
        if before.told == told:
            return Synced(run.name, "unchanged")
        session = read_session(run)
        if session is None:  # damaged
            session = new_session(run, "online")
            write_session(run, session)
        rows = _upload(run, session, limit_s or upload_limit_s(run))
        # A plain `wandb sync` has nothing to do any more.
        last_step = int(latest_values(run.metrics_file).get("step", -1))
        on_record = OnRecord(before.run_id, max(before.step, last_step), told=told)
        write_on_record(run, on_record)
        leave_out_others(run, on_record)
        note_closed(run, session.token)
    return Synced(run.name, "unchanged" if rows is None else "uploaded", rows or 0)


def upload_as_new(run: Run, judge: Judge = system_lock_decides) -> None:
    """Have the next sync upload all of a run to a W&B run of its own.

    Raises:
        TrackingError: It trains now.
    """
    if trainer := _trainer_of(run, judge):
        raise TrackingError(f"{run.name} trains now ({trainer}): cancel it first")
    run.renew_tracking_id()
    # Another token: what W&B refused was the run's earlier id.
    if session := read_session(run):
        write_session(run, replace(session, token=new_session(run, session.mode).token))


def _trainer_of(run: Run, judge: Judge) -> str | None:
    """Who trains the run, or seems to: not everywhere are locks of another node seen."""
    if holder := lock_holder(run.folder, judge):
        return holder
    status = run.status()
    attempt = status.open_attempt if status else None
    if attempt is None or same_host(attempt.job.host, socket.gethostname()):
        return None
    files = [path for path in (run.metrics_file, run.status_file) if path.exists()]
    written = max((path.stat().st_mtime for path in files), default=0.0)
    return attempt.job.words if time.time() - written < QUIET_S else None


def _upload(run: Run, session: Session, limit_s: float) -> int | None:
    """Have the mirror upload what is missing. Returns how many rows; None if nothing was.

    Raises:
        TrackingError: It could not; see `sync_run`.
    """
    # Here, before a second is spent on loading wandb for each of a hundred runs.
    check_server_answers()
    with start_mirror(run, session, "syncs") as mirror:
        try:
            output, _ = mirror.communicate(timeout=limit_s)
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
        f"the server still lacks {news.get('lacks', 'an answer')}; sync again, it continues from "
        f"what the server has ({run.folder / 'wandb' / 'mirror.log'})"
    )


def _to_tell(run: Run) -> dict[str, Any]:
    """Differs when there is something to say to the server; asks no server."""
    status = run.status()
    rows = run.metrics_file.stat() if run.metrics_file.exists() else None
    return {
        "server": server_url(),
        "outcome": asdict(status.outcome) if status and status.outcome else None,
        "rows": [rows.st_size, rows.st_mtime_ns] if rows else None,
    }
