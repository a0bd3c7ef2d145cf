"""The process that mirrors a run to W&B: logs those rows of `metrics.jsonl` that W&B lacks.

`python -m flowjobs.tracking.mirror FOLDER TOKEN PARENT ROLE`, as `tracking.process` starts it.

A process of its own, beside the one that trains, so that nothing that W&B does (waits for a
server, hangs, dies, prints) reaches the training, and so that what was logged reaches W&B when the
training is killed. What it tells it reads in the run's folder; its standard input says only when
`status.json` holds the outcome. On its standard output go JSON lines of what its parent should
know. It ends with 0 if W&B knows the state of the run.
"""

import json
import logging
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

from flowjobs.errors import LockHeldError, ServerError
from flowjobs.runs.files import append_line
from flowjobs.runs.hint import hint
from flowjobs.runs.metrics import MetricsReader, Row, read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_PREEMPTED, Outcome
from flowjobs.runs.surroundings import note_surroundings
from flowjobs.tracking import record
from flowjobs.tracking.mode import ResolvedMode, server_url
from flowjobs.tracking.process import EXIT_NOT_TOLD, Role
from flowjobs.tracking.session import (
    FLUSH_INTERVAL_S,
    WandbSession,
    may_succeed_at_once,
    missing_on_server,
    tear_down_wandb,
)
from flowjobs.working_folder import working_folder

logger = logging.getLogger(__name__)

# What a sync says of a run without an outcome.
DIED = Outcome("preempted", EXIT_PREEMPTED, "its process died; not restarted yet")

# How often rows are looked for: wandb tells twenty at once for the price of five one by one.
PACE_S = 0.5
# How soon the death of the parent is seen, and how long what is left may take then.
PARENT_POLL_S, LINGER_S = 2.0, 60.0
FIRST_RETRY_S, LAST_RETRY_S = 2.0, 600.0
# How long the server may take to count what it has received, and how often it is asked.
SEEN_WITHIN_S, SEEN_WITHIN_BESIDE_TRAINING_S = 10.0, 3.0
ASK_EVERY_S = 0.5


class NotUploadedError(Exception):
    """The server does not have what it was sent."""


class Mirror:
    """Keeps W&B in step with the run's folder.

    Args:
        run: The run.
        session: The session that this process writes.
        role: What this process is for.
        pipes: File descriptors: of one that can be read when it is time to finish, and of one that
            news go to.
    """

    def __init__(
        self, run: Run, session: record.Session, role: Role, pipes: tuple[int, int]
    ) -> None:
        self._run = run
        self._session = session
        self._mode: ResolvedMode = "online" if role == "sync" else session.mode
        self._role = role
        self._to_finish, self._events = pipes
        self._rows: MetricsReader | None = None
        # Noted on disk, so that what is told to W&B later has the times of then.
        self._times = {row["step"]: row["time"] for row in read_rows(run.row_times_file)}
        # The newest row: if it is the run's last, the picture goes into it.
        self._held: Row | None = None
        self._wandb: WandbSession | None = None
        self._files_before: set[Path] = set()
        self._warned = False
        self._retry_at, self._retry_after = 0.0, FIRST_RETRY_S
        self._refused = False
        self._sent = 0

    def run_beside_training(self, parent: int) -> bool:
        """Mirror until told to finish, or left alone. Returns whether W&B knows the run's end."""
        # A forked worker of the parent may outlive it, and keeps the pipe open.
        while os.getppid() == parent:
            if self._is_superseded():
                return False
            self._log_if_possible()
            if select.select([self._to_finish], [], [], PACE_S)[0]:
                break
        if record.state_to_report(self._run).outcome is None:  # the trainer died
            self._log_if_possible(ended=True)
            # Not `finish`, which would say how the run ended: wandb writes its file by itself.
            time.sleep(2 * FLUSH_INTERVAL_S)
            return False
        return self.tell()

    def tell(self) -> bool:
        """Tell W&B all of the run, and how it ended. Returns whether W&B knows it now."""
        syncs = self._role == "sync"
        state = record.state_to_report(self._run, server_url() if syncs else "")
        if state.outcome is None and not syncs:
            return True  # an attempt has begun, and says itself what comes of it
        outcome = state.outcome or DIED
        if not (syncs and self._server_has_all(state, outcome)):
            if not self._finish(outcome, retry=True):
                return False
            if syncs:
                self._remove_new_folders()  # the server has it
                self._send(uploaded=self._sent)
        record.note_reported(self._run, state)
        return True

    def _server_has_all(self, state: record.Report, outcome: Outcome) -> bool:
        reported = record.read_uploaded(self._run).reported
        if state.evaluation != (reported.evaluation if reported else ()):
            return False  # measured since, by `flowjobs evaluate`
        try:
            return not missing_on_server(self._run, record.last_step_of(self._run), outcome)
        except Exception as error:  # of any kind; opening a session tells more of it
            logger.info("the server does not say what it has: %s", error)
            return False

    def _finish(self, outcome: Outcome, *, retry: bool) -> bool:
        if self._is_superseded() or self._refused:  # a refusal would be the same again
            return False
        try:
            wandb = self._opened_wandb()
            self._log_new_rows(wandb)
            if self._is_superseded():  # that may have taken a while
                return False
            drawn = outcome.state == "finished" and self._run.samples_picture.exists()
            picture = self._run.samples_picture if drawn else None
            if self._held is not None:
                self._log_held_row(wandb, picture)
                picture = None
            wandb.finish(outcome, picture)
            # A preempted job has no time for it, and its next session logs what the server lacks.
            leaves = outcome.state in ("preempted", "cancelled")
            if self._mode == "online" and not (self._role == "train" and leaves):
                self._verify_on_server()
        except Exception as error:
            # A signal to all processes of the job has killed wandb's own, or that gave up on a
            # server that answers again: then once more, anew.
            retry = retry and may_succeed_at_once(error)
            self._retry_later(error, silently=retry)
            return retry and self._finish(outcome, retry=False)
        return not self._is_superseded()

    def _is_superseded(self) -> bool:
        """Whether a later session, as of the next attempt, owns the run in W&B."""
        return record.is_superseded(self._run, self._session)

    def _verify_on_server(self) -> None:
        """Ask the server, since wandb's `finish` says nothing of what it had to throw away.

        Raises:
            NotUploadedError: It lacks something, or does not say.
        """
        # Where nothing was sent, the server said itself that it has all rows, as the session began.
        last_step = record.last_step_of(self._run) if self._sent else -1
        within_s = SEEN_WITHIN_BESIDE_TRAINING_S if self._role == "train" else SEEN_WITHIN_S
        give_up_at = time.monotonic() + within_s
        while lacks := missing_on_server(self._run, last_step):
            if time.monotonic() > give_up_at:
                raise NotUploadedError(f"the server lacks {lacks}")
            time.sleep(ASK_EVERY_S)

    def _log_if_possible(self, *, ended: bool = False) -> None:
        """Log the rows that W&B lacks, if it answers; one that may be the last only if `ended`."""
        if self._refused or (self._wandb is None and time.monotonic() < self._retry_at):
            return
        try:
            wandb = self._opened_wandb()
            self._log_new_rows(wandb)
            # A run ends at an epoch's end, and draws its picture after that. So only such a row
            # waits, until the next one is there.
            if ended or "val/loss" not in (self._held or ()):
                self._log_held_row(wandb)
        except Exception as error:
            self._retry_later(error)

    def _log_new_rows(self, wandb: WandbSession) -> None:
        """Log all rows that are there but the newest, which is held."""
        if self._rows is None:
            attempt = self._run.status().open_attempt
            # Until it trains, rows may be there that it will drop.
            waits = self._role == "train" and attempt is not None and attempt.trains is None
            if waits or not self._run.metrics_file.exists():
                return
            # From the top: W&B may lack rows of earlier attempts too.
            self._rows = MetricsReader(self._run.metrics_file)
        rows = self._rows.new_rows()
        self._note_times(rows, self._rows.written_at())
        for row in rows:
            if row["step"] > wandb.last_step:
                self._log_held_row(wandb)
                self._held = row

    def _note_times(self, rows: Iterable[Row], written_at: float) -> None:
        """Note the time of rows that were written just now, or while nobody looked."""
        # All rows of one look get the time of the last: exact while a mirror runs, the file's own
        # after a pause. Steps that were lost and repeated keep their first time.
        new = {row["step"]: written_at for row in rows if row["step"] not in self._times}
        self._times |= new
        if new:
            lines = [json.dumps({"step": step, "time": time}) for step, time in new.items()]
            with suppress(OSError):  # a full disk
                append_line(self._run.row_times_file, "\n".join(lines))

    def _log_held_row(self, wandb: WandbSession, picture: Path | None = None) -> None:
        if self._held is not None:
            wandb.log(self._held, self._times[self._held["step"]], picture)
            self._held = None
            self._sent += 1

    def _opened_wandb(self) -> WandbSession:
        if self._wandb is None:
            self._files_before = set(record.session_files(self._run))
            trains_here = self._role == "train"
            self._wandb = WandbSession(self._run, self._mode, trains_here=trains_here)
            self._send(connected=True)
            self._warned = False
            self._retry_after = FIRST_RETRY_S
        return self._wandb

    def _retry_later(self, error: Exception, *, silently: bool = False) -> None:
        """Tear wandb down, whatever happened to it, and say when another session is tried."""
        opened = self._wandb is not None
        # The next session reads all rows again, since only the server knows what it took of them.
        self._wandb = self._rows = self._held = None
        self._sent = 0
        # The whole traceback once: a server may be away for days.
        logger.warning("lost W&B: %s", error, exc_info=None if self._warned else error)
        self._retry_at = time.monotonic() + self._retry_after
        self._retry_after = min(2 * self._retry_after, LAST_RETRY_S)
        failure = f"W&B cannot be told now ({type(error).__name__}: {error})"
        # A server that does not answer one run answers none; what it says is said to this one.
        no_answer = isinstance(error, ServerError) or "imed out" in str(error)
        kind: str = "server" if no_answer and not opened else "run"
        if refusal := record.refusal_of(error, self._run):
            record.note_refusal(self._run, refusal)
            self._refused = True
            failure, kind = refusal.text, refusal.kind
        if refusal or not (self._warned or silently):
            self._warned = True
            self._send(failure=failure, kind=kind)
        tear_down_wandb()
        if not opened:  # a server may be away for days, and each try leaves a folder with no row
            self._remove_new_folders()

    def _remove_new_folders(self) -> None:
        for path in set(record.session_files(self._run)) - self._files_before:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _send(self, **news: str | bool | int) -> None:
        with suppress(OSError):  # nobody listens any more
            os.write(self._events, (json.dumps(news) + "\n").encode())


def end_with(parent: int, role: Role) -> None:
    """End this process with its parent, also if wandb hangs; beside a training some time after."""
    poll_s, linger_s = (0.1, 0.0) if role == "sync" else (PARENT_POLL_S, LINGER_S)
    while os.getppid() == parent:
        time.sleep(poll_s)
    time.sleep(linger_s)
    os._exit(EXIT_NOT_TOLD)


def main() -> None:
    """Mirror the run in the folder of the first argument; see the module."""
    folder, token, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
    role = cast(Role, sys.argv[4])
    run = Run.at(Path(folder).absolute())
    here = working_folder()
    os.chdir(run.wandb_folder)  # wandb reads wandb/settings of the working directory
    # Nothing that wandb reads or prints, nor its own process, may take part in the conversation.
    to_finish, events = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    threading.Thread(target=end_with, args=(parent, role), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s")
    session = record.read_session(run)
    if session is None or session.token != token:
        sys.exit(EXIT_NOT_TOLD)
    mirror = Mirror(run, session, role, (to_finish, events))
    # One at a time, offline too: what W&B has on record is found out first, then added to.
    try:
        with nullcontext() if role == "sync" else record.upload_lock(run):  # a sync holds it itself
            if role == "train":
                note_surroundings(run, here)
                record.note_refusal(run, None)  # each attempt is a new try
            told = mirror.run_beside_training(parent) if role == "train" else mirror.tell()
    except LockHeldError as error:
        sync = hint("sync", run.name, study=run.study)
        logger.warning("%s; `%s` uploads what W&B lacks", error, sync)
        told = False
    # Not sys.exit: wandb's hooks there wait for servers, and would end a session that only died.
    os._exit(0 if told else EXIT_NOT_TOLD)


if __name__ == "__main__":
    main()
