"""Brings a run to the W&B server from a node that has internet, each logged step exactly once.

W&B is a mirror: what is uploaded is not the run's own sessions but one clean session, made anew
(`clean_session`) of the rows of `metrics.jsonl` past the last step that the server says it has, and
closed with the state that `status.json` gives. So it does not matter how the run's sessions
overlap, where they were torn, which of them were uploaded before and by whom, or where an upload
was cut: the next one asks the server again and goes on from there. With explicit steps wandb's own
sync takes the rows as they are; it says that all went well whether or not it did, so the server is
asked again afterwards.

A run that trains now is left for later as a whole: an upload ends with a state, and "running" is
none that it can end with. A run that waits for its next job is uploaded and shown as preempted,
also when its process was killed: whether that was the end is for others to find out.
"""

import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flowjobs.errors import ServerError, TrackingError
from flowjobs.runs.files import write_json
from flowjobs.runs.lock import Judge, lock_holder, system_lock_decides
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_PREEMPTED, Outcome, same_host
from flowjobs.tracking.child import child_environment, module_command
from flowjobs.tracking.clean_session import (
    Ending,
    Recorded,
    read_sessions,
    tracked_files,
    write_clean_session,
)
from flowjobs.tracking.labels import renewed_notes, tags_for
from flowjobs.tracking.offline_files import leave_to_the_original
from flowjobs.tracking.refusal import current_refusal, note_refusal, refusal_of
from flowjobs.tracking.rewinding import rewind_as_asked
from flowjobs.tracking.server import RunAddress, RunOnServer, Server
from flowjobs.tracking.session import new_session, read_session, upload_lock, write_session

POLL_S = 1.0
# How long the server may have no new row before an upload counts as stuck.
STALL_S = 60.0
# How long the server may take to count what it has received.
COUNTED_WITHIN_S = 10.0
# How long a run that another node trains may write nothing, and still be taken to train.
QUIET_S = 600.0
# After an upload was cut, the server may still be taking in the last of it.
SETTLED_AFTER_S = 2.0
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Synced:
    """What a sync did for a run.

    Attributes:
        state: "uploaded"; "unchanged", for the server had all; "trains", and was left for later;
            "untracked", by its config or since it never started.
        rows: How many rows were sent.
        note: More for a person, or "".
    """

    run: str
    state: Literal["uploaded", "unchanged", "trains", "untracked"]
    rows: int = 0
    note: str = ""


def sync_run(
    run: Run,
    server: Server,
    progress: Progress,
    *,
    judge: Judge = system_lock_decides,
    stall_s: float = STALL_S,
) -> Synced:
    """Make the server have all of a run that does not train now; twice does no harm.

    Args:
        run: The run.
        server: Where to.
        progress: Called with the rows that arrived, and those that were sent.
        judge: Says whether who is named as the run's holder still trains it.
        stall_s: The upload is ended when the server has no new row for so long.

    Raises:
        ServerError: The server cannot be used now.
        TrackingError: It does not have what was sent.
    """
    if done := _nothing_to_do(run, server, judge):
        return done
    refusal = current_refusal(run)
    if refusal and refusal.for_ever:
        raise TrackingError(refusal.text)
    with upload_lock(run):
        # Another sync held it, and has done the work.
        if done := _nothing_to_do(run, server, judge):
            return done
        seen = _fingerprint(run, server)
        sent = _bring_up_to_date(run, server, progress, stall_s)
        for path in tracked_files(run):
            # A plain `wandb sync` would send its rows again, and the server have them twice.
            path.with_name(f"{path.name}.synced").touch()
        write_json(_state_file(run), {"fingerprint": seen})
        session = read_session(run)
        untold = session and session.outcome and not session.closed
        if session and untold and not lock_holder(run.folder, judge):
            write_session(run, replace(session, closed=True))
    return Synced(run.name, "unchanged" if sent is None else "uploaded", sent or 0)


def upload_as_new(run: Run, judge: Judge = system_lock_decides) -> None:
    """Have the next sync upload all of a run to a W&B run of its own.

    Raises:
        TrackingError: It trains now.
    """
    if holder := lock_holder(run.folder, judge) or _trains_elsewhere(run):
        raise TrackingError(f"{run.name} trains now ({holder}): cancel it first")
    run.renew_tracking_id()
    if session := read_session(run):
        write_session(run, replace(session, token=new_session(run, session.mode).token))


def _nothing_to_do(run: Run, server: Server, judge: Judge) -> Synced | None:
    if run.config().tracking.wandb_mode == "disabled" or not run.tracking_file.exists():
        return Synced(run.name, "untracked")
    if holder := lock_holder(run.folder, judge) or _trains_elsewhere(run):
        return Synced(run.name, "trains", note=holder)
    leave_to_the_original(run.folder, run.settle_tracking_id())
    return Synced(run.name, "unchanged") if _is_synced(run, server) else None


def _trains_elsewhere(run: Run) -> str | None:
    """Where the run trains, if it seems to: not everywhere are locks of another node seen."""
    status = run.status()
    attempt = status.open_attempt if status else None
    if attempt is None or same_host(attempt.job.host, socket.gethostname()):
        return None
    files = [path for path in (run.metrics_file, run.status_file) if path.exists()]
    written = max((path.stat().st_mtime for path in files), default=0.0)
    return attempt.job.words if time.time() - written < QUIET_S else None


def _bring_up_to_date(run: Run, server: Server, progress: Progress, stall_s: float) -> int | None:
    """Upload what is missing. Returns how many rows that were; None if not even the state was."""
    # Beside the sessions, and where a plain `wandb sync` does not look.
    work = run.folder / "wandb" / "upload"
    if work.exists():
        time.sleep(SETTLED_AFTER_S)
        shutil.rmtree(work)
    recorded = read_sessions(tracked_files(run))
    address = _address(run, recorded)
    rewind_as_asked(run, server, address)
    before = server.run(address)
    ending = _ending(run, before)
    last = max((row["step"] for row in read_rows(run.metrics_file)), default=-1)
    if before.last_step >= last and _ended(before, ending):
        return None

    folder = work / f"offline-run-{time.strftime('%Y%m%d_%H%M%S')}-{run.tracking_id()}"
    steps = write_clean_session(
        run,
        recorded,
        folder,
        after_step=before.last_step,
        after_event_s=before.last_event_s,
        ending=ending,
    )

    def arrived() -> int:
        return server.run(address, patience_s=0).rows - before.rows

    progress(0, len(steps))
    said = _upload(folder, arrived, lambda rows: progress(rows, len(steps)), stall_s)
    last_step = steps[-1] if steps else before.last_step
    if refusal := refusal_of(said, run):
        note_refusal(run, read_session(run) or new_session(run, "online"), refusal)
        raise TrackingError(refusal.text)
    _verify(server, address, before.rows + len(steps), last_step, said)
    progress(len(steps), len(steps))
    shutil.rmtree(work)
    return len(steps)


def _verify(server: Server, address: RunAddress, rows: int, last_step: int, said: str) -> None:
    """Raise a TrackingError unless the server has the rows, and the end of the session."""
    give_up_at = time.monotonic() + COUNTED_WITHIN_S
    while True:
        there = server.run(address)
        if (there.rows, there.last_step) == (rows, last_step) and there.state != "running":
            return
        if time.monotonic() > give_up_at:
            raise TrackingError(
                f"the server has {there.rows} rows to step {there.last_step}, state "
                f"{there.state or 'unknown'}; expected {rows} to step {last_step}. "
                f"Sync again. wandb said: {said}"
            )
        time.sleep(POLL_S)


def _upload(
    folder: Path, arrived: Callable[[], int], progress: Callable[[int], None], stall_s: float
) -> str:
    """Run wandb's own sync on a session's folder. Returns what it said last."""
    log = folder.parent / "sync.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*module_command("flowjobs.tracking.upload"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**child_environment(), "WANDB_DIR": str(folder.parent)},  # for its logs
            # Ctrl-C is for us; we end the upload.
            start_new_session=True,
        ) as process,
    ):
        try:
            _wait(process, arrived, progress, stall_s)
        finally:
            process.kill()
    return " / ".join(log.read_text(errors="replace").splitlines()[-3:])


def _wait(
    process: "subprocess.Popen[bytes]",
    arrived: Callable[[], int],
    progress: Callable[[int], None],
    stall_s: float,
) -> None:
    rows, moved_at = 0, time.monotonic()
    while True:
        try:
            process.wait(POLL_S)
            return
        except subprocess.TimeoutExpired:
            pass
        try:
            now = arrived()
        except ServerError:
            now = rows
        if now > rows:
            rows, moved_at = now, time.monotonic()
            progress(rows)
        if time.monotonic() - moved_at > stall_s:
            raise TrackingError(
                f"the server took {rows} rows and then none for {stall_s:.0f} s; sync again, it "
                "goes on from there"
            )


def _ending(run: Run, there: RunOnServer) -> Ending:
    """What W&B is to show, from the run's status; a person's tags and notes there stay."""
    status = run.status()
    session = read_session(run)
    # Where the status was damaged, what was told to W&B is all that is known.
    outcome = status.outcome if status else (session.outcome if session else None)
    if outcome is None:
        outcome = Outcome("preempted", EXIT_PREEMPTED, "its process ended without a word")
    return Ending(
        exit_code=outcome.exit_code,
        preempting=outcome.state in ("preempted", "cancelled"),
        tags=tags_for(outcome, there.tags),
        notes=renewed_notes(run, outcome, there.notes),
    )


def _ended(there: RunOnServer, ending: Ending) -> bool:
    """Whether the server shows the ending already."""
    states = {"failed"}
    if ending.preempting:
        states = {"preempting", "preempted"}
    elif ending.exit_code == 0:
        states = {"finished"}
    return (
        there.state in states
        and set(there.tags) == set(ending.tags)
        and there.notes == ending.notes
    )


def _address(run: Run, recorded: Recorded) -> RunAddress:
    tracking = run.config().tracking
    # Where the config leaves the entity open, WANDB_ENTITY may have named it on the cluster.
    entity = recorded.run.run.entity if recorded.run else ""
    return RunAddress(entity or tracking.wandb_entity, tracking.wandb_project, run.tracking_id())


def _is_synced(run: Run, server: Server) -> bool:
    try:
        found = json.loads(_state_file(run).read_text())
        return bool(found["fingerprint"] == _fingerprint(run, server))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _state_file(run: Run) -> Path:
    return run.folder / "wandb" / "synced.json"


def _fingerprint(run: Run, server: Server) -> str:
    """Differs when there is something to say to the server; asks no server."""
    status = run.status()
    said = [server.url, run.tracking_id()]
    if status is not None:
        said += [status.state, status.reason, str(status.exit_code)]
    for path in (run.metrics_file, *tracked_files(run)):
        if path.exists():
            stat = path.stat()
            said.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(said).encode()).hexdigest()
