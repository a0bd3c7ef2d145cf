"""Tells W&B how a run ended whose process could not. Loads no wandb: a process of its own does."""

import dataclasses
import logging

from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome
from flowjobs.tracking.mode import resolve_mode
from flowjobs.tracking.session import Session, new_session, read_session, write_session
from flowjobs.tracking.wandb_tracker import start_mirror, wait_for_mirror

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0


def close_session(run: Run, outcome: Outcome) -> bool:
    """Mark the newest session of a run with an outcome, unless W&B knows it already.

    What an attempt said of itself wins over what others found out about it, and a finished run
    stays finished. A run that never reached W&B (its start failed) gets a session that says so.
    Rows that W&B lacks are caught up from `metrics.jsonl`. Takes about a second, or a minute where
    a server does not answer; never raises because of W&B. Twice does no harm.

    The caller holds the run's lock, or knows that no attempt is alive.

    Args:
        run: The run.
        outcome: How its newest attempt ended.

    Returns:
        False if there was nothing to tell. True if there was: W&B knows it now, or the outcome is
        kept in the run's folder as `pending_outcome` until it can be told.
    """
    session = _session_to_close(run, outcome)
    if session is None:
        return False
    try:
        write_session(run, session)
        if not wait_for_mirror(start_mirror(run, session), CLOSE_TIMEOUT_S):
            logger.warning("W&B could not be told that %s is %s", run.name, outcome.state)
    except OSError as error:
        logger.warning("W&B could not be told that %s is %s: %s", run.name, outcome.state, error)
    return True


def pending_outcome(run: Run) -> Outcome | None:
    """What W&B is still to be told: `close_session(run, outcome)` tells it.

    The session says it; where its process was killed before it could, `status.json` does.
    """
    session = read_session(run)
    if session and session.outcome and not session.closed:
        return session.outcome
    mode, _ = resolve_mode(run.config().tracking)
    status = run.status()
    if mode == "disabled" or status is None or not status.attempts or status.open_attempt:
        return None
    newest = status.attempts[-1]
    if session and session.closed and session.attempt >= newest.number:
        return None
    return Outcome(status.state, status.exit_code or 0, status.reason, kind=newest.kind)


def _session_to_close(run: Run, outcome: Outcome) -> Session | None:
    mode, _ = resolve_mode(run.config().tracking)
    if mode == "disabled":
        return None
    found = read_session(run)
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
    return dataclasses.replace(
        newest, attempt=found.attempt, mode=found.mode, summary=found.summary, outcome=outcome
    )
