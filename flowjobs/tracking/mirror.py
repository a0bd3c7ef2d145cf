"""The process that mirrors a run to W&B: logs those rows of `metrics.jsonl` that W&B lacks.

`python -m flowjobs.tracking.mirror FOLDER TOKEN PARENT ROLE`, as `tracking.process` starts it.

A process of its own, beside the one that trains, so that nothing that W&B does (waits for a
server, hangs, dies, prints) reaches the training, and so that what was logged reaches W&B when the
training is killed. On its standard input come "follow", when the rows of earlier attempts that
do not count any more are gone from `metrics.jsonl`, "last", when the next row is the run's last,
and "finish", when `status.json` holds the outcome. On its standard output go JSON lines of what its
parent should know. It ends with 0 if W&B knows the state of the run.
"""

import dataclasses
import json
import logging
import math
import os
import select
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import cast

from flowjobs.errors import LockHeldError
from flowjobs.runs.files import append_line
from flowjobs.runs.hint import hint
from flowjobs.runs.metrics import MetricsReader, Row, read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_PREEMPTED, Outcome
from flowjobs.runs.surroundings import note_surroundings
from flowjobs.tracking.mode import server_url
from flowjobs.tracking.process import Role
from flowjobs.tracking.record import (
    Session,
    is_superseded,
    last_step_of,
    note_refusal,
    note_reported,
    read_session,
    refusal_of,
    session_files,
    state_to_report,
    upload_lock,
)
from flowjobs.tracking.session import (
    FLUSH_INTERVAL_S,
    NotUploadedError,
    WandbSession,
    may_succeed_at_once,
    missing_on_server,
    tear_down_wandb,
)

logger = logging.getLogger(__name__)

EXIT_CLOSED, EXIT_NOT_CLOSED = 0, 3

# How often rows are looked for: wandb tells twenty at once for the price of five one by one.
PACE_S = 0.5
# How soon the death of the parent is seen, and how long what is left may take then.
PARENT_POLL_S, LINGER_S = 2.0, 60.0
FIRST_RETRY_S, LAST_RETRY_S = 2.0, 600.0
# How long the server may take to count what it has received, and how often it is asked.
SEEN_WITHIN_S: dict[Role, float] = {"follow": 3.0, "close": 10.0, "sync": 10.0}
ASK_EVERY_S = 0.5


class Mirror:
    """Keeps W&B in step with the run's folder.

    Args:
        run: The run.
        session: The session that this process writes.
        role: What this process is for.
        parent: The process that started this one.
        commands: File descriptor that commands are read from.
        events: File descriptor that news go to.
    """

    def __init__(
        self, run: Run, session: Session, role: Role, parent: int, commands: int, events: int
    ) -> None:
        self._run = run
        self._session = session
        self._role = role
        self._parent: int | None = parent
        self._commands = commands
        self._events = events
        self._following = False
        self._rows: MetricsReader | None = None
        # When each row was written, which `metrics.jsonl`, the same in all runs, cannot say. Noted
        # beside it, so that what is told to W&B later has the times of then.
        self._times_file = run.folder / "wandb" / "times.jsonl"
        self._times = {row["step"]: row["time"] for row in read_rows(self._times_file)}
        # The run's last row waits for the picture that belongs into it.
        self._held: Row | None = None
        self._newest_is_last = False
        self._asked_to_finish = False
        self._wandb: WandbSession | None = None
        self._files_before: set[Path] = set()
        self._warned = False
        self._retry_at, self._retry_after = 0.0, FIRST_RETRY_S
        self._sent = 0

    def follow(self) -> int:
        """Mirror until told to finish, or left alone. Returns the exit code."""
        # A forked worker of the parent may outlive it, and keeps the pipe open.
        while not self._asked_to_finish and os.getppid() == self._parent:
            if is_superseded(self._run, self._session):
                return EXIT_NOT_CLOSED
            self._log_if_possible()
            if not self._asked_to_finish:
                self._take_commands(PACE_S)
        if state_to_report(self._run).outcome is None:  # the trainer died
            self._take_commands()
            self._newest_is_last = False  # whatever was said: no picture comes
            self._log_if_possible()
            time.sleep(2 * FLUSH_INTERVAL_S)
            return EXIT_NOT_CLOSED
        return self.finish()

    def finish(self) -> int:
        """Tell W&B the state of the run. Returns the exit code."""
        state = state_to_report(self._run)
        if (outcome := state.outcome) is None:
            return EXIT_CLOSED  # an attempt has begun, and says itself what comes of it
        if not self._finish(outcome, retry=True):
            return EXIT_NOT_CLOSED
        note_reported(self._run, state)
        return EXIT_CLOSED

    def sync(self) -> int:
        """Make the server have all of the run, and see that it has. Returns the exit code."""
        state = state_to_report(self._run, server_url())
        died = Outcome("preempted", EXIT_PREEMPTED, "its process died; not restarted yet")
        outcome = state.outcome or died
        uploads = True
        try:
            uploads = bool(missing_on_server(self._run, last_step_of(self._run), outcome))
        except Exception as error:  # of any kind; opening a session tells more of it
            logger.info("the server does not say what it has: %s", error)
        if uploads:
            if not self._finish(outcome, retry=True):
                return EXIT_NOT_CLOSED
            self._remove_new_folders()  # the server has it
            self._send(uploaded=self._sent)
        note_reported(self._run, state)
        return EXIT_CLOSED

    def _finish(self, outcome: Outcome, *, retry: bool) -> bool:
        self._following = True
        self._newest_is_last = outcome.state == "finished"
        # An attempt that has begun says itself what comes of it; a refusal would be the same again.
        if is_superseded(self._run, self._session) or self._retry_at == math.inf:
            return False
        try:
            if self._wandb is None:
                self._open()
            self._log_new_rows()
            if is_superseded(self._run, self._session):
                return False
            self._report_outcome(outcome)
            # A preempted job has no time for it, and its next session logs what the server lacks.
            leaves = outcome.state in ("preempted", "cancelled")
            if self._session.mode == "online" and not (self._role == "follow" and leaves):
                self._verify_on_server()
        except Exception as error:
            # A signal to all processes of the job has killed wandb's own, or that gave up on a
            # server that answers again: then once more, anew.
            retry = retry and may_succeed_at_once(error)
            self._retry_later(error, silently=retry)
            return retry and self._finish(outcome, retry=False)
        return not is_superseded(self._run, self._session)

    def _report_outcome(self, outcome: Outcome) -> None:
        assert self._wandb is not None, "opened before"
        drawn = outcome.state == "finished" and self._run.samples_picture.exists()
        picture = self._run.samples_picture if drawn else None
        if self._held is not None:
            self._log_held_row(picture)
            picture = None
        self._wandb.finish(outcome, picture)

    def _verify_on_server(self) -> None:
        """Ask the server, since wandb's `finish` says nothing of what it had to throw away.

        Raises:
            NotUploadedError: It lacks something, or does not say.
        """
        # Where nothing was sent, the server said itself that it has all rows, as the session began.
        last_step = last_step_of(self._run) if self._sent else -1
        give_up_at = time.monotonic() + SEEN_WITHIN_S[self._role]
        while lacks := missing_on_server(self._run, last_step):
            if time.monotonic() > give_up_at:
                raise NotUploadedError(f"the server lacks {lacks}")
            time.sleep(ASK_EVERY_S)

    def _log_if_possible(self) -> None:
        """Log the rows that W&B lacks, if it answers."""
        try:
            if self._wandb is None:
                if time.monotonic() < self._retry_at:
                    return
                self._open()
            self._log_new_rows()
        except Exception as error:
            self._retry_later(error)

    def _log_new_rows(self) -> None:
        """Log all rows that are there but the run's last one."""
        assert self._wandb is not None, "opened before"
        if self._rows is None:
            if not self._following or not self._run.metrics_file.exists():
                return
            # From the top: W&B may lack rows of this attempt and of those before it.
            self._rows = MetricsReader(self._run.metrics_file)
        rows = self._rows.new_rows()
        self._note_times(rows, self._rows.written_at())
        # "last" comes before the last row: where that has been read, it can be heard by now.
        self._take_commands()
        for row in rows:
            if row["step"] > self._wandb.last_step:
                self._log_held_row()
                self._held = row
        if not self._newest_is_last:
            self._log_held_row()

    def _note_times(self, rows: Iterable[Row], written_at: float) -> None:
        """Note the time of rows that were written just now, or while nobody looked."""
        # Steps that were lost and repeated keep their first time.
        new = {row["step"]: written_at for row in rows if row["step"] not in self._times}
        self._times |= new
        if new:
            lines = [json.dumps({"step": step, "time": time}) for step, time in new.items()]
            with suppress(OSError):  # a full disk
                append_line(self._times_file, "\n".join(lines))

    def _log_held_row(self, picture: Path | None = None) -> None:
        if self._held is None:
            return
        assert self._wandb is not None, "opened before"
        self._wandb.log(self._held, self._times[self._held["step"]], picture)
        self._held = None
        self._sent += 1

    def _open(self) -> None:
        self._files_before = set(session_files(self._run))
        trains_here = self._role == "follow"
        self._wandb = WandbSession(self._run, self._session, trains_here=trains_here)
        self._send(connected=True)
        if self._warned:
            self._send(info="W&B answers again; it gets what it missed")
            self._warned = False
        self._retry_after = FIRST_RETRY_S

    def _retry_later(self, error: Exception, *, silently: bool = False) -> None:
        """Tear wandb down, whatever happened to it, and say when another session is tried."""
        opened = self._wandb is not None
        self._wandb = self._rows = self._held = None
        self._sent = 0
        # The whole traceback once: a server may be away for days.
        logger.warning("lost W&B: %s", error, exc_info=None if self._warned else error)
        self._retry_at = time.monotonic() + self._retry_after
        self._retry_after = min(2 * self._retry_after, LAST_RETRY_S)
        why = f"W&B cannot be told now ({type(error).__name__}: {error})"
        kind: str = "run" if opened else "server"
        if refusal := refusal_of(error, self._run):
            note_refusal(self._run, refusal)
            self._retry_at = math.inf
            why, kind = refusal.text, refusal.kind
        if refusal or not (self._warned or silently):
            self._warned = True
            warning = f"{why}; training continues, and metrics.jsonl has every row"
            self._send(connected=False, warning=warning, failure=why, kind=kind)
        tear_down_wandb()
        if not opened:  # a server may be away for days, and each try leaves a folder with no row
            self._remove_new_folders()

    def _remove_new_folders(self) -> None:
        for path in set(session_files(self._run)) - self._files_before:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _take_commands(self, timeout_s: float = 0.0) -> None:
        """Take what the parent asks for; waits so long for it."""
        ready, _, _ = select.select([self._commands], [], [], timeout_s)
        if not ready:
            return
        text = os.read(self._commands, 4096).decode()
        if not text:
            self._parent = None
        for command in text.split():
            match command:
                case "follow":
                    self._following = True
                case "last":
                    self._newest_is_last = True
                case "finish":
                    self._asked_to_finish = True

    def _send(self, **news: str | bool | int) -> None:
        with suppress(OSError):  # nobody listens any more
            os.write(self._events, (json.dumps(news) + "\n").encode())


def end_with(parent: int, role: Role) -> None:
    """End this process with its parent, also if wandb hangs; beside a training some time after."""
    syncs = role == "sync"
    while os.getppid() == parent:
        time.sleep(0.1 if syncs else PARENT_POLL_S)
    time.sleep(0 if syncs else LINGER_S)
    os._exit(EXIT_NOT_CLOSED)


def main() -> None:
    """Mirror the run in the folder of the first argument; see the module."""
    folder, token, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
    role = cast(Role, sys.argv[4])
    run = Run.at(Path(folder).absolute())
    here = Path.cwd()
    os.chdir(run.folder / "wandb")  # wandb reads wandb/settings of the working directory
    # Nothing that wandb reads or prints, nor its own process, may take part in the conversation.
    commands, events = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    threading.Thread(target=end_with, args=(parent, role), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s")
    session = read_session(run)
    if session is None or session.token != token:
        sys.exit(EXIT_NOT_CLOSED)
    if role == "sync":
        session = dataclasses.replace(session, mode="online")
    mirror = Mirror(run, session, role, parent, commands, events)
    # One at a time, offline too: what W&B has on record is found out first, then added to.
    try:
        with nullcontext() if role == "sync" else upload_lock(run):  # a sync holds it itself
            match role:
                case "follow":
                    note_surroundings(run, here)
                    note_refusal(run, None)  # each attempt is a new try
                    code = mirror.follow()
                case "close":
                    code = mirror.finish()
                case "sync":
                    code = mirror.sync()
    except LockHeldError as error:
        sync = hint("sync", run.name, study=run.study)
        logger.warning("%s; `%s` uploads what W&B lacks", error, sync)
        code = EXIT_NOT_CLOSED
    # Not sys.exit: wandb's hooks there wait for servers, and would end a session that only died.
    os._exit(code)


if __name__ == "__main__":
    main()
