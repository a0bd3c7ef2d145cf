"""Tells W&B how a run ended whose process could not. Loads no wandb: the mirror does."""

import dataclasses
import logging
import subprocess

from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome, RunStatus
from flowjobs.tracking.mode import resolve_mode
from flowjobs.tracking.outcome import (
    Mode,
    Session,
    current_refusal,
    new_session,
    read_session,
    write_session,
)
from flowjobs.tracking.process import start_mirror, upload_limit_s

logger = logging.getLogger(__name__)


def close_session(run: Run, outcome: Outcome, *, wait: bool = True) -> bool:
    """Mark the newest session of a run with an outcome, unless W&B knows it already.

    What an attempt said of itself wins over what others found out about it, and a finished run
    stays finished. A run that never reached W&B (its start failed) gets a session that says so.
    Rows that W&B lacks are caught up from `metrics.jsonl`. Takes about a second, or a minute where
    a server does not answer; never raises because of W&B. Twice does no harm.

    The caller holds the run's lock, or knows that no attempt is alive.

    Args:
        run: The run.
        outcome: How its newest attempt ended.
        wait: Return when W&B knows; else a process that outlives this one for a while tells it.

    Returns:
        False if there was nothing to tell. True if there was: W&B knows it now, or the outcome is
        kept in the run's folder as `pending_outcome` until it can be told.
    """
    session = _session_to_close(run, outcome)
    if session is None:
        return False
    try:
        write_session(run, session)
        mirror = start_mirror(run, session, "closes")
        if wait:
            wait_for_mirror(run, session, mirror, upload_limit_s(run))
    except OSError as error:
        logger.warning("W&B could not be told that %s is %s: %s", run.name, outcome.state, error)
    return True


def pending_outcome(run: Run) -> Outcome | None:
    """What W&B is still to be told: `close_session(run, outcome)` tells it.

    None where W&B refuses the run: `sync`, which its user asks for, tries again. The session says
    it; where its process was killed before it could, `status.json` does.
    """
    if current_refusal(run):
        return None
    session, status = read_session(run), run.status()
    if session and session.outcome and not session.closed:
        return session.outcome
    if status is None or not _mode_of(run, session):
        return None
    if session and session.closed and session.attempt >= len(status.attempts):
        return None
    return status.outcome


def wait_for_mirror(
    run: Run, session: Session, mirror: subprocess.Popen[bytes], timeout_s: float
) -> None:
    """Wait until W&B knows how a session ended; end the mirror, and warn, if that takes longer."""
    assert session.outcome is not None, "there is something to tell"
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
    state = session.outcome.state
    logger.warning("W&B does not know that %s is %s: %s", run.name, state, what_to_do)


def _session_to_close(run: Run, outcome: Outcome) -> Session | None:
    found = read_session(run)
    if not (mode := _mode_of(run, found)):
        return None
    newest = new_session(run, mode)
    if found is None or found.attempt < newest.attempt:
        return dataclasses.replace(newest, outcome=outcome)
    said = found.outcome
    if said is not None:
        if said.state in ("finished", outcome.state):
            outcome = said
        if found.closed and said.state == outcome.state:
            return None
    # A token of its own: a process that still mirrors the dead attempt stops.
    return dataclasses.replace(found, token=newest.token, outcome=outcome, closed=False)


def _mode_of(run: Run, session: Session | None) -> Mode | None:
    """Where to W&B is told of the run; None if it is not."""
    mode, _ = resolve_mode(run.config().tracking)
    status = run.status() or RunStatus()
    # A session is noted before a run trains: without one, WANDB_MODE kept W&B out there.
    untracked = session is None and any(a.first_step is not None for a in status.attempts)
    return None if mode == "disabled" or untracked else mode
