"""Tells W&B how an attempt ended that could not tell it itself. Loads no wandb: the mirror does."""

import logging
import subprocess

from flowjobs.runs.hint import hint
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome
from flowjobs.tracking.mode import ResolvedMode, has_login, is_here, resolve_mode, server_of
from flowjobs.tracking.process import start_mirror, upload_limit_s
from flowjobs.tracking.record import (
    Session,
    begin_session,
    read_session,
    read_uploaded,
    state_to_report,
)

logger = logging.getLogger(__name__)


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
    if mode == "disabled" or _unreported_outcome(run) is None:
        return False
    server = server_of(run.config().tracking)
    if mode == "online" and not (is_here(server) or has_login(server)):
        # The server's own word would count for all who ask from elsewhere.
        logger.warning("W&B could not be told how %s ended: no login for %s", run.name, server)
        return True
    try:
        session = begin_session(run, mode)
        mirror = start_mirror(run, session, "close")
        if wait:
            wait_for_mirror(run, session, mirror, upload_limit_s(run))
    except OSError as error:
        logger.warning("W&B could not be told how %s ended: %s", run.name, error)
    return True


def pending_outcome(run: Run) -> Outcome | None:
    """What W&B is still to be told: `close_session` tells it.

    None where W&B refuses the run: `sync`, which its user asks for, tries again.
    """
    return None if read_uploaded(run).refusal else _unreported_outcome(run)


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
        return  # W&B knows, or a later session tells it
    refusal = read_uploaded(run).refusal
    again = hint("sync", run.name, study=run.study)
    what_to_do = refusal.text if refusal else f"`{again}` tries again"
    state = run.status().state
    logger.warning("W&B does not know that %s is %s: %s", run.name, state, what_to_do)


def _unreported_outcome(run: Run) -> Outcome | None:
    """How the run's newest attempt ended, if W&B is told of the run and does not know that."""
    mode, _ = resolve_mode(run.config().tracking)
    status = run.status()
    # A session is noted before a run trains: without one, WANDB_MODE kept W&B out there. Nor is it
    # told of a run without an attempt, which was cancelled before it began.
    trained = any(attempt.first_step is not None for attempt in status.attempts)
    untracked = read_session(run) is None and (trained or not status.attempts)
    if mode == "disabled" or untracked:
        return None
    known, now = read_uploaded(run).reported, state_to_report(run)
    is_known = known and (known.attempts, known.outcome) == (now.attempts, now.outcome)
    return None if is_known else status.outcome
