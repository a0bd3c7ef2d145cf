"""W&B for a training run: starts the mirror, talks to it, never waits for it long."""

import json
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flowjobs.errors import RunTakenOverError
from flowjobs.runs.run import Run
from flowjobs.tracking import record
from flowjobs.tracking.mode import ResolvedMode, resolve_mode, tracking_in_words
from flowjobs.tracking.process import Role, start_mirror, wait_for_mirror

logger = logging.getLogger(__name__)

# A preempted run must be gone before its grace is over; so must one that W&B does not answer.
SHORT_FINISH_S = 5.0
LONG_FINISH_S = 15.0
# How soon a mirror that has died is replaced, and a later one at the latest.
FIRST_PAUSE_S, LAST_PAUSE_S = 2.0, 600.0


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Mirror the run to W&B; see `flowjobs.runs.recorder.Track`."""
    tracking = record.tracking_of(run)
    mode, _ = resolve_mode(tracking)
    for line in tracking_in_words(tracking):
        logger.info("%s", line)
    if mode == "disabled":
        yield
        return
    tracker = WandbTracker(run, mode)
    try:
        yield
    except RunTakenOverError:
        tracker.leave()  # its end is not the run's
        raise
    except BaseException:
        tracker.finish()
        raise
    tracker.finish()


class WandbTracker:
    """Mirrors a run to W&B, online or in offline files under the run's folder.

    None of its methods raises, and none but `finish` waits.

    Args:
        run: The run; its newest attempt is the one that is tracked.
        mode: Where to.
    """

    def __init__(self, run: Run, mode: ResolvedMode) -> None:
        self._run = run
        self._mode = mode
        self._connected: bool | None = None
        self._warned = False
        self._session: record.Session | None = None
        self._mirror: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()
        self._finishing = threading.Event()
        with self._never_stopping():
            self._start_mirror("train")
        with self._never_stopping():
            # Not a thread to wait for.
            threading.Thread(target=self._keep_mirror, daemon=True).start()

    def leave(self) -> None:
        """Tell W&B nothing more: another attempt has the run."""
        self._finishing.set()

    def finish(self) -> None:
        """Have W&B told what `status.json` says now. Waits for a few seconds at most."""
        self._finishing.set()
        with self._never_stopping(), self._changing:
            if self._session and record.is_superseded(self._run, self._session):
                return
            session, mirror = self._session, self._mirror
            if session is None or mirror is None or mirror.poll() is not None:
                session, mirror = self._start_mirror("report")  # it was killed: this one catches up
            if mirror.stdin is not None:
                with suppress(BrokenPipeError):  # it has died just now
                    # Not closed: forked workers would keep it open.
                    os.write(mirror.stdin.fileno(), b"finish\n")
            patient = self._connected and self._run.status().state in ("finished", "failed")
            limit_s = LONG_FINISH_S if patient else SHORT_FINISH_S
            wait_for_mirror(self._run, session, mirror, limit_s)

    def _keep_mirror(self) -> None:
        """Log what the mirror reports, and start another one where it dies or gives up."""
        pause_s = FIRST_PAUSE_S
        while True:
            with self._never_stopping():
                self._log_news()
            if self._finishing.wait(pause_s):
                return
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
            with self._never_stopping(), self._changing:
                if self._finishing.is_set():
                    return
                if self._session and record.is_superseded(self._run, self._session):
                    return
                if self._mirror is not None:
                    said = "the process that tells W&B has ended (%s); another one starts"
                    logger.warning(said, self._run.mirror_log)
                self._mirror, self._connected = None, False
                self._start_mirror("train")

    def _start_mirror(self, role: Role) -> "tuple[record.Session, subprocess.Popen[bytes]]":
        self._session = self._session or record.begin_session(self._run, self._mode)
        self._mirror = start_mirror(self._run, self._session, role)
        return self._session, self._mirror

    def _log_news(self) -> None:
        """Log what the mirror reports, until it ends."""
        mirror = self._mirror
        if mirror is None or mirror.stdout is None:
            return
        with mirror.stdout:
            for line in mirror.stdout:
                news = json.loads(line)
                if "failure" in news:
                    what = "%s; training continues, and metrics.jsonl has every row"
                    logger.warning(what, news["failure"])
                elif self._connected is False:
                    logger.info("W&B answers again; it gets what it missed")
                self._connected = "failure" not in news

    @contextmanager
    def _never_stopping(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: tracking never stops training
            if not self._warned:
                self._warned = True
                logger.warning("W&B gets nothing of this attempt for now: %s", error)
