"""The process that mirrors a run to W&B.

`python -m flowjobs.tracking.mirror FOLDER TOKEN PARENT trains|closes`: started by the process that
trains the run, or by one that tells how it ended.

A process of its own, beside the one that trains, so that nothing that W&B does (waits for a
server, hangs, dies, prints) reaches the training, and so that what was logged gets on record when
the training is killed. It follows `metrics.jsonl`; on its standard input come "follow", when the
rows of earlier attempts that do not count any more are gone from that file, "last", when the next
row is the run's last, and "finish", when `tracking.json` holds the outcome; what W&B should forget
is noted on disk (`rewinding`). On its standard output go JSON lines of what a person should know.
It ends with 0 if W&B knows the outcome.
"""

import contextlib
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
from pathlib import Path
from typing import Any

from flowjobs.errors import LockHeldError
from flowjobs.runs.metrics import MetricsReader, Row, read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus
from flowjobs.tracking.identity import note_surroundings
from flowjobs.tracking.refusal import current_refusal, note_refusal, refusal_of
from flowjobs.tracking.rewinding import asked_to_rewind, need_not_rewind
from flowjobs.tracking.session import LOWEST, Session, read_session, upload_lock, write_session
from flowjobs.tracking.wandb_session import (
    FLUSH_INTERVAL_S,
    WandbSession,
    may_pass_at_once,
    tear_down_wandb,
)

logger = logging.getLogger(__name__)

EXIT_CLOSED, EXIT_NOT_CLOSED = 0, 3

# How often rows are looked for: wandb tells twenty at once for the price of five one by one.
PACE_S = 0.5
# How soon the death of the parent is seen, and how long what is left may take then.
PARENT_POLL_S, LAST_WORDS_S = 2.0, 60.0
FIRST_RETRY_S, LAST_RETRY_S = 2.0, 600.0


class Mirror:
    """Keeps W&B in step with the run's folder, as long as the training process lives.

    Args:
        run: The run.
        session: The session that this process writes.
        commands: File descriptor that commands are read from.
        events: File descriptor that a person's news go to.
        parent: The process that started this one.
        trains_here: Whether the parent is the one that trains.
    """

    def __init__(
        self,
        run: Run,
        session: Session,
        commands: int,
        events: int,
        parent: int,
        *,
        trains_here: bool,
    ) -> None:
        self._run = run
        self._session = session
        self._commands = commands
        self._events = events
        self._parent: int | None = parent
        self._trains_here = trains_here
        self._following = False
        self._rows: MetricsReader | None = None
        # The run's last row waits for the picture that belongs into it.
        self._held: Row | None = None
        self._newest_is_last = False
        self._asked_to_finish = False
        self._wandb: WandbSession | None = None
        self._folders_before: set[Path] = set()
        self._complained = False
        self._retry_at, self._retry_after = 0.0, FIRST_RETRY_S
        self._owner_read = 0

    def follow_to_the_end(self) -> int:
        """Mirror until told to finish. Returns the exit code."""
        while not self._asked_to_finish:
            if self._superseded():
                return EXIT_NOT_CLOSED
            # A forked worker of the parent may outlive it, and keeps the pipe open.
            if os.getppid() != self._parent:
                return self._end_alone()
            self._put_on_record()
            if not self._asked_to_finish:
                self._take_commands(PACE_S)
        return EXIT_CLOSED if self.finish() else EXIT_NOT_CLOSED

    def _end_alone(self) -> int:
        """The training process is gone, perhaps with a word on disk that it could not tell here."""
        status = self._run.status() or RunStatus()
        outcome = status.outcome
        if outcome and len(status.attempts) == self._session.attempt:
            self._session = dataclasses.replace(self._session, outcome=outcome)
            write_session(self._run, self._session)
            return EXIT_CLOSED if self.finish() else EXIT_NOT_CLOSED
        self._take_commands()
        self._newest_is_last = False  # whatever was said: no picture comes
        self._put_on_record()
        time.sleep(2 * FLUSH_INTERVAL_S)
        return EXIT_NOT_CLOSED

    def finish(self) -> bool:
        """Tell W&B the outcome that is on disk. Returns whether it knows it now."""
        newest = read_session(self._run)
        if newest is not None and newest.token == self._session.token:
            self._session = newest
        self._following = True
        outcome = self._session.outcome
        self._newest_is_last = outcome is not None and outcome.state == "finished"
        return self._finish(retry=True)

    def _finish(self, *, retry: bool) -> bool:
        self._retry_at = 0.0
        if self._superseded():
            return False  # an attempt has begun, and says itself what comes of it
        if current_refusal(self._run):
            return False  # it would say the same again
        try:
            if self._wandb is None:
                self._open()
            self._log_new_rows()
            if self._superseded():
                return False
            self._say_outcome()
        except Exception as error:
            # A signal to all processes of the job has killed wandb's own: then once more, anew.
            retry = retry and may_pass_at_once(error)
            self._lose(error, silently=retry)
            return retry and self._finish(retry=False)
        if not self._superseded():
            write_session(self._run, dataclasses.replace(self._session, closed=True))
        return True

    def _say_outcome(self) -> None:
        outcome = self._session.outcome
        assert outcome is not None, "the outcome is on disk before the command comes"
        picture: Path | None = self._run.samples_picture
        if outcome.state != "finished" or not self._run.samples_picture.exists():
            picture = None
        assert self._wandb is not None, "opened before"
        if self._held is not None:
            self._log_held_row(picture)
            picture = None
        summary = summary_of(read_rows(self._run.metrics_file)) | self._session.summary
        self._wandb.finish(outcome, summary, picture)

    def _put_on_record(self) -> None:
        """Log the rows that W&B lacks, if it answers."""
        try:
            if self._wandb is None:
                if time.monotonic() < self._retry_at:
                    return
                self._open()
            self._log_new_rows()
        except Exception as error:
            self._lose(error)

    def _log_new_rows(self) -> None:
        """Log all rows that are there but the run's last one."""
        assert self._wandb is not None, "opened before"
        if self._rows is None:
            if not self._following or not self._run.metrics_file.exists():
                return
            # From the top: W&B may lack rows of this attempt and of those before it.
            self._rows = MetricsReader(self._run.metrics_file)
        rows = [row for row in self._rows.new_rows() if row["step"] > self._wandb.on_record]
        if self._has_rows_to_forget(self._wandb):
            self._wandb.leave()
            self._wandb = self._rows = self._held = None
            self._open()  # where that is done
            self._log_new_rows()
            return
        # "last" comes before the last row: where that has been read, it can be heard by now.
        self._take_commands()
        for row in rows:
            self._log_held_row()
            self._held = row
        if not self._newest_is_last:
            self._log_held_row()

    def _has_rows_to_forget(self, session: WandbSession) -> bool:
        """Whether W&B has rows that came out otherwise since.

        That is asked for before the first one that differs is written.
        """
        step = asked_to_rewind(self._run)
        if step is None or self._session.mode == "offline":
            return False  # `sync` uploads no row but those of `metrics.jsonl`
        if step >= session.on_record:
            need_not_rewind(self._run)
            return False
        return True

    def _log_held_row(self, picture: Path | None = None) -> None:
        if self._held is None:
            return
        assert self._wandb is not None, "opened before"
        self._wandb.log(self._held, picture)
        self._wandb.on_record = self._held["step"]
        self._held = None

    def _open(self) -> None:
        self._folders_before = self._session_folders()
        self._wandb = WandbSession(self._run, self._session.mode, trains_here=self._trains_here)
        self._tell(connected=True)
        if self._complained:
            self._tell(info="W&B answers again; it gets what it missed")
            self._complained = False
        self._retry_after = FIRST_RETRY_S

    def _session_folders(self) -> set[Path]:
        return set(self._run.folder.glob("wandb/*run-*"))

    def _lose(self, error: Exception, *, silently: bool = False) -> None:
        """Start anew later, after whatever happened to wandb."""
        never_opened = self._wandb is None
        self._wandb = self._rows = self._held = None
        # The whole traceback once: a server may be away for days.
        logger.warning("lost W&B: %s", error, exc_info=None if self._complained else error)
        if refusal := refusal_of(str(error), self._run):
            note_refusal(self._run, self._session, refusal)
            self._retry_after = math.inf
            self._complained = True
            self._tell(connected=False, warning=f"{refusal.text}; training goes on")
        elif not (self._complained or silently):
            self._complained = True
            self._tell(
                connected=False,
                warning=f"W&B does not go on ({type(error).__name__}: {error}); training does, "
                "metrics.jsonl has every row, and W&B gets them when it can",
            )
        tear_down_wandb()
        if never_opened:  # a server may be away for days, and each try leaves a folder with no row
            for folder in self._session_folders() - self._folders_before:
                shutil.rmtree(folder, ignore_errors=True)
        self._retry_at = time.monotonic() + self._retry_after
        if not refusal:
            self._retry_after = min(2 * self._retry_after, LAST_RETRY_S)

    def _superseded(self) -> bool:
        """Whether a later attempt owns the run in W&B: this one lost it and still lives."""
        try:
            written = self._run.tracking_file.stat().st_mtime_ns
        except OSError:
            return False
        if written == self._owner_read:
            return False
        self._owner_read = written
        newest = read_session(self._run)
        return newest is not None and newest.token != self._session.token

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

    def _tell(self, **news: str | bool) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(self._events, (json.dumps(news) + "\n").encode())


def summary_of(rows: Iterable[Row]) -> dict[str, Any]:
    """What a run's summary says of its rows: the lowest losses, the newest of all else.

    Each session says it whole: wandb itself knows only the rows of a session of its own.
    """
    summary: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            if key in LOWEST:
                summary[key] = {"min": min(value, summary.get(key, {}).get("min", value))}
            elif key != "step":
                summary[key] = value
    return summary


def end_with(parent: int) -> None:
    """End this process some time after its parent, also if wandb hangs and never returns."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    time.sleep(LAST_WORDS_S)
    os._exit(EXIT_NOT_CLOSED)


def main() -> None:
    """Mirror the run in the folder of the first argument; see the module."""
    folder, token, parent, role = sys.argv[1:5]
    threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
    run = Run.at(Path(folder))
    # Nothing that wandb reads or prints, nor its own process, may take part in the conversation.
    commands, events = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s")
    session = read_session(run)
    if session is None or session.token != token:
        sys.exit(EXIT_NOT_CLOSED)
    trains_here = role == "trains"
    mirror = Mirror(run, session, commands, events, int(parent), trains_here=trains_here)
    # One at a time, offline too: what W&B has on record is found out first, then added to.
    try:
        with upload_lock(run):
            if trains_here:
                note_surroundings(run, Path.cwd())
            if session.outcome is not None:
                code = EXIT_CLOSED if mirror.finish() else EXIT_NOT_CLOSED
            else:
                code = mirror.follow_to_the_end()
    except LockHeldError as error:
        logger.warning("%s; `flowjobs sync` uploads what W&B lacks", error)
        code = EXIT_NOT_CLOSED
    # Not sys.exit: wandb's hooks there wait for servers, and would end a session that only died.
    os._exit(code)


if __name__ == "__main__":
    main()
