"""The training process's end of the mirror: starts it, talks to it, never waits for it long."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome
from flowjobs.tracking.child import child_environment, module_command
from flowjobs.tracking.refusal import current_refusal
from flowjobs.tracking.rewinding import ask_to_rewind
from flowjobs.tracking.session import Mode, Session, new_session, read_session, write_session

logger = logging.getLogger(__name__)

# A preempted run must be gone before its grace is over; so must one that W&B does not answer.
SHORT_FINISH_S = 5.0
LONG_FINISH_S = 15.0

# Slurm signals every process of a job; the mirror is to end when the training has said its last.
SIGNALS_FOR_TRAINING_ALONE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}


class WandbTracker:
    """Mirrors a run to W&B, online or in offline files under the run's folder.

    Args:
        run: The run; its newest attempt is the one that is tracked.
        mode: Where to.
    """

    def __init__(self, run: Run, mode: Mode) -> None:
        self._run = run
        self._session = new_session(run, mode)
        self._connected = False
        self._said = False
        self._mirror: subprocess.Popen[bytes] | None = None
        self._try(self._start)

    def follow(self) -> None:
        """See `Tracker`."""
        self._try(lambda: self._send("follow"))

    def last_row_comes(self) -> None:
        """See `Tracker`."""
        self._try(lambda: self._send("last"))

    def comes_out_otherwise(self, step: int) -> None:
        """See `Tracker`."""
        try:
            ask_to_rewind(self._run, step)
        except OSError as error:
            logger.warning("W&B keeps other values past step %d: %s", step, error)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        summary = self._session.summary | dict(values)
        self._session = dataclasses.replace(self._session, summary=summary)

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._try(lambda: self._finish(outcome))

    def _start(self) -> None:
        write_session(self._run, self._session)
        self._mirror = start_mirror(self._run, self._session, "trains")
        if self._session.outcome is not None:
            return
        # Not a thread to wait for: it ends when the mirror does.
        threading.Thread(target=self._pass_on, args=(self._mirror,), daemon=True).start()

    def _finish(self, outcome: Outcome) -> None:
        newest = read_session(self._run)
        if newest is not None and newest.token != self._session.token:
            return  # another attempt has taken the run over; the mirror sees it too, and stops
        self._session = dataclasses.replace(self._session, outcome=outcome)
        if self._mirror is None or self._mirror.poll() is not None:
            self._start()  # it was killed; a new one catches up and finds the outcome on disk
        else:
            write_session(self._run, self._session)
            self._send("finish")
        assert self._mirror is not None
        patient = self._connected and outcome.state in ("finished", "failed")
        closed = wait_for_mirror(self._mirror, LONG_FINISH_S if patient else SHORT_FINISH_S)
        if not closed:
            say_untold(self._run, outcome)

    def _send(self, command: str) -> None:
        if self._mirror is not None and self._mirror.stdin is not None:
            self._mirror.stdin.write(f"{command}\n".encode())
            self._mirror.stdin.flush()

    def _pass_on(self, mirror: subprocess.Popen[bytes]) -> None:
        """Say to the person at the log what the mirror says."""
        assert mirror.stdout is not None
        with mirror.stdout:
            for line in mirror.stdout:
                news = json.loads(line)
                self._connected = news.get("connected", self._connected)
                if "warning" in news:
                    logger.warning("%s", news["warning"])
                if "info" in news:
                    logger.info("%s", news["info"])

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of any kind: tracking never stops training
            if not self._said:
                self._said = True
                logger.warning("W&B gets nothing of this attempt for now: %s", error)


def say_untold(run: Run, outcome: Outcome) -> None:
    """Warn that W&B does not know how a run ended."""
    refusal = current_refusal(run)
    what_to_do = refusal.text if refusal else f"`flowjobs sync {run.name}` tries again"
    logger.warning("W&B does not know that %s is %s: %s", run.name, outcome.state, what_to_do)


def start_mirror(
    run: Run, session: Session, role: Literal["trains", "closes"]
) -> subprocess.Popen[bytes]:
    """Start the process that mirrors a session, which is the one in the run's folder.

    Without an outcome in the session it waits for commands; with one it tells W&B and ends. `role`
    is what this process does: it trains the run, or it tells how another one ended.

    Raises:
        OSError: It could not be started.
    """
    log = run.folder / "wandb" / "mirror.log"
    log.parent.mkdir(exist_ok=True)
    pipe = subprocess.PIPE if session.outcome is None else subprocess.DEVNULL
    command = module_command("flowjobs.tracking.mirror")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_FOR_TRAINING_ALONE)
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                [*command, run.folder, session.token, str(os.getpid()), role],
                stdin=pipe,
                stdout=pipe,
                stderr=output,
                # wandb's telemetry goes by this and not by `init(mode=…)`: offline, it would take a
                # third of each row's time for nothing.
                env={**child_environment(), "WANDB_MODE": session.mode},
                start_new_session=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for_mirror(mirror: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait until a mirror ends, or end it. Returns whether W&B knows the outcome."""
    try:
        code = mirror.wait(timeout_s)
    except subprocess.TimeoutExpired:
        mirror.kill()  # wandb's own process sees that and goes too
        code = mirror.wait()
    if mirror.stdin is not None:
        mirror.stdin.close()
    return code == 0
