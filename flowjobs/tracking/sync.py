"""Uploads to W&B what it lacks of runs that do not train, from a node that has internet.

The mirror, run online, logs the rows of `metrics.jsonl` past the last step that the server has,
each with its own time, reports the outcome that `status.json` gives, and asks the server whether it
has all. So it does not matter what W&B's own files hold, or where an upload was cut: the next one
continues from what the server has. Loads no wandb: the mirror does.

A run that trains now is left for later as a whole: an upload ends with a state, and "running" is
none that it can end with. A run that waits for its next job is uploaded and shown as preempted,
also when its process was killed: whether that was the end is for others to find out.
"""

import json
import socket
import subprocess
from dataclasses import dataclass
from typing import Any, Literal

from flowjobs.errors import LoginError, ServerError, TrackingError
from flowjobs.runs.hint import hint
from flowjobs.runs.lock import Judge, lock_holder, system_lock_decides, written_lately
from flowjobs.runs.run import Run
from flowjobs.runs.status import same_host
from flowjobs.tracking import record
from flowjobs.tracking.mode import check_server_answers, server_of
from flowjobs.tracking.process import failure_of_mirror, start_mirror, upload_limit_s

# How long a run that another node trains may write nothing, and still be taken to train.
WRITTEN_WITHIN_S = 600.0


class DeletedError(TrackingError):
    """The run was deleted in W&B."""


@dataclass(frozen=True)
class Synced:
    """What a sync did for a run.

    Attributes:
        state: "uploaded"; "complete", for the server has all; "unchanged" since the server last had
            all, and not asked again; "running", and left for later; "untracked".
        rows: How many rows were sent.
        note: Who trains it, or why it is untracked, or "".
    """

    state: Literal["uploaded", "complete", "unchanged", "running", "untracked"]
    rows: int = 0
    note: str = ""


def sync_run(
    run: Run, judge: Judge = system_lock_decides, *, ask: bool = False, as_new: bool = False
) -> Synced:
    """Make the server have all of a run that does not train now; twice does no harm.

    Args:
        run: The run.
        judge: Says whether who is named as the run's holder still trains it.
        ask: Ask the server also where it had all, and nothing has changed here: there it may be
            deleted, or undeleted. And upload what trained without W&B, if its config has it now.
        as_new: Ask it, and give the run a new id if it is deleted there. Only the server knows
            that: repeated, this does not make another run of one that is there.

    Raises:
        LoginError: The server refuses the key.
        ServerError: It cannot be used now, for any run.
        TrackingError: It does not have what was sent.
    """
    if why := _why_untracked(run, named=ask or as_new):
        return Synced("untracked", note=why)
    if trainer := _who_trains(run, judge):
        return Synced("running", note=trainer)
    with record.upload_lock(run):
        # Under the lock: another sync may have told it a moment ago.
        run.ensure_tracking_id()  # first: a copy of a run that was deleted is not deleted
        known = record.read_uploaded(run)
        if not (ask or as_new):
            if known.refusal and known.refusal.kind == "deleted":
                raise DeletedError(known.refusal.text)
            if known.reported == record.state_to_report(run, server_of(record.tracking_of(run))):
                return Synced("unchanged")
        try:
            return _upload(run)
        except DeletedError:
            if not as_new:
                raise
        run.renew_tracking_id()
        return _upload(run)


def _why_untracked(run: Run, *, named: bool) -> str:
    """Why W&B is to have nothing of a run, and what changes that; empty if it is."""
    uploads = f"`{hint('sync', run.name, study=run.study)}` uploads it"
    if run.config().tracking.wandb_mode == "disabled":
        return (
            f"{run.config_file} says wandb_mode disabled; submit it with --wandb-mode online, or "
            f"write that there, and {uploads}"
        )
    if run.tracking_file.exists():
        return ""
    if not run.status().attempts:
        return "it has not started"
    # Only a person who names it takes back that it was to be kept out.
    return "" if named else f"it trained without W&B; {uploads}"


def _who_trains(run: Run, judge: Judge) -> str | None:
    """Who trains the run, or seems to: not everywhere are locks of another node seen."""
    if holder := lock_holder(run.folder, judge):
        return holder
    attempt = run.status().open_attempt
    if attempt is None or same_host(attempt.job.host, socket.gethostname()):
        return None
    return attempt.job.description if written_lately(run.folder, WRITTEN_WITHIN_S) else None


def _upload(run: Run) -> Synced:
    """Have the mirror upload what is missing.

    Raises:
        TrackingError: It could not; see `sync_run`.
    """
    # Here, before a second is spent on loading wandb for each of a hundred runs.
    check_server_answers(server_of(record.tracking_of(run)))
    session = record.read_session(run) or record.begin_session(
        run, "online"
    )  # damaged, or trained without W&B
    with start_mirror(run, session, "sync") as mirror:
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
        return Synced("uploaded", news["uploaded"]) if "uploaded" in news else Synced("complete")
    if "failure" in news:
        kinds = {"login": LoginError, "server": ServerError, "deleted": DeletedError}
        error = kinds.get(news["kind"], TrackingError)
        # A refusal has its own remedy in it.
        again = {"run": "; sync again", "server": f", met with {run.name}; sync again"}
        raise error(news["failure"] + again.get(news["kind"], ""))
    raise TrackingError(
        failure_of_mirror(run, mirror.returncode)
        or "the server has not taken all of it in time; sync again, it continues from what is "
        f"there ({run.mirror_log})"
    )
