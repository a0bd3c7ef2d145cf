"""An open session of a run in W&B, online or in an offline file. Loads wandb.

Its methods may raise whatever wandb raises, and may take long when a server does not answer.
"""

import logging
import os
import socket
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
import wandb.errors
from wandb.sdk import wandb_setup

from flowjobs.errors import LoginError, TrackingError
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_PREEMPTED, Outcome
from flowjobs.tracking.identity import config_for_wandb
from flowjobs.tracking.labels import renewed_notes, tags_for
from flowjobs.tracking.offline_files import (
    append_preempted,
    is_closed,
    is_header_only,
    last_step_on_record,
    leave_to_the_original,
    session_files,
)
from flowjobs.tracking.refusal import DELETED
from flowjobs.tracking.rewinding import need_not_rewind, rewind_as_asked
from flowjobs.tracking.server import RunAddress, Server
from flowjobs.tracking.session import LOWEST, PICTURE, Mode

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0
INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 15
# A hard kill loses what wandb has not flushed to its file: by default 15 s of everything.
FLUSH_INTERVAL_S = 0.25
FLUSH_TIMEOUT_S = 3


class NotWrittenError(OSError):
    """The offline file is not complete on disk."""


class RunDeletedError(Exception):
    """W&B does not have the run any more."""


class WandbSession:
    """Opens a session of the run: the same W&B run each time, with its identity complete.

    Args:
        run: The run.
        mode: Where the session goes.
        trains_here: Whether the attempt runs on this machine; else only its end is told.

    Attributes:
        on_record: The last step that W&B has from sessions before; -1 if it has none.
    """

    def __init__(self, run: Run, mode: Mode, *, trains_here: bool = True) -> None:
        self._folder_run = run
        self._mode = mode
        run_id = run.settle_tracking_id()
        leave_to_the_original(run.folder, run_id)
        if mode == "offline":
            close_dead_files(run, run_id)
            self.on_record = last_step_on_record(run.folder, run_id)
        # What a parent process, or a session before, left here would be joined.
        os.environ.pop("WANDB_SERVICE", None)
        config = run.config()
        if mode == "online":
            check_server_answers()
            self._forget_lost_rows()
        self._run = wandb.init(
            project=config.tracking.wandb_project,
            entity=config.tracking.wandb_entity,
            group=config.training.group,
            name=run.name,
            id=run_id,
            config=config_for_wandb(run),
            dir=run.folder,
            mode=mode,
            # An attempt goes on with the run that the one before it left.
            resume="allow",
            settings=wandb.Settings(
                x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                x_stats_pid=os.getppid(),
                # What wandb finds out of this machine says nothing of one that trained.
                x_disable_meta=not trains_here,
                x_disable_stats=not trains_here,
                disable_git=True,  # the config has it
                console="off",
                silent=True,
            ),
        )
        if mode == "online":
            self.on_record = self._run.starting_step - 1
        for metric in LOWEST:
            self._run.define_metric(metric, summary="min")
        self._is_open = False
        self._label(None)
        self._is_open = True

    def _forget_lost_rows(self) -> None:
        """Before the session begins: it goes on from the last row that there is."""
        run, tracking = self._folder_run, self._folder_run.config().tracking
        settings = wandb_setup.singleton().settings
        try:
            server = Server.of_this_login(settings.base_url)
        except LoginError:  # an identity token's, which only wandb can use
            need_not_rewind(run)
            return
        entity = tracking.wandb_entity or settings.entity
        rewind_as_asked(run, server, RunAddress(entity, tracking.wandb_project, run.tracking_id()))

    @property
    def file(self) -> Path:
        """The session's own record on disk."""
        return Path(self._run.settings.sync_file)

    def log(self, row: Mapping[str, Any], picture: Path | None = None) -> None:
        """Put one row of `metrics.jsonl` on record, with the picture in it if there is one."""
        values = {key: value for key, value in row.items() if key != "step"}
        if picture is not None:
            values[PICTURE] = wandb.Image(str(picture))
        # With commit the row is on record now; without, only when the next step is logged.
        self._run.log(values, step=row["step"], commit=True)

    def leave(self) -> None:
        """End the session; the run goes on in another one."""
        self._run.mark_preempting()
        self._run.finish(exit_code=EXIT_PREEMPTED)

    def finish(self, outcome: Outcome, summary: Mapping[str, Any], picture: Path | None) -> None:
        """Say how the attempt ended, and wait until it is on record.

        Args:
            outcome: How it ended.
            summary: Values of the run's summary.
            picture: A picture that no row holds.

        Raises:
            TimeoutError: The server does not take it.
            NotWrittenError: The disk does not.
        """
        if summary:
            self._run.summary.update(dict(summary))
        if picture is not None and PICTURE not in dict(self._run.summary):
            self._run.summary[PICTURE] = wandb.Image(str(picture))
        self._label(outcome)
        # A cancelled run is neither finished nor failed; like a preempted one it may go on.
        if outcome.state in ("preempted", "cancelled"):
            self._run.mark_preempting()
        self._run.finish(exit_code=outcome.exit_code)
        if self._mode == "offline":
            self._wait_until_written()

    def _wait_until_written(self) -> None:
        """`finish` returns before the file is flushed, and says nothing of a full disk."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while not is_closed(self.file):
            if time.monotonic() > deadline:
                raise NotWrittenError(f"{self.file} is not complete: is the disk full?")
            time.sleep(0.02)

    def _label(self, outcome: Outcome | None) -> None:
        tags, notes = self._labels_there()
        self._run.tags = tags_for(outcome, tags)
        self._run.notes = renewed_notes(self._folder_run, outcome, notes)

    def _labels_there(self) -> tuple[Sequence[str], str]:
        """What W&B has now: a person may have written there since the session began."""
        if self._mode == "online":
            address = RunAddress(self._run.entity, self._run.project, self._run.id)
            url = wandb_setup.singleton().settings.base_url
            with suppress(TrackingError):
                there = Server.of_this_login(url).run(address, patience_s=0)
                if there.state:
                    return there.tags, there.notes
                if self._is_open:
                    # wandb says nothing of that: it sends rows to nobody, and "succeeds".
                    raise RunDeletedError(f"run {self._run.id} was {DELETED}")
        return self._run.tags or (), self._run.notes or ""


def check_server_answers() -> None:
    """Raise CommError if nothing listens at W&B's address: `wandb.init` waits half a minute."""
    # Not wandb.setup(): it waits for ever if wandb's own process is killed as it starts (0.31).
    url = urlsplit(wandb_setup.singleton().settings.base_url)
    if urllib.request.getproxies().get(url.scheme):
        return
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    try:
        socket.create_connection(address, PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise wandb.errors.CommError(f"no answer from {url.netloc}: {error}") from error


def may_pass_at_once(error: Exception) -> bool:
    """Whether a new session may do: wandb's own process died, and not a server that refuses."""
    return not isinstance(error, wandb.Error | TrackingError | TimeoutError | NotWrittenError)


def tear_down_wandb() -> None:
    """Forget everything of a session that broke, so that another one can begin."""
    try:
        wandb.teardown()
    except (Exception, SystemExit):
        logger.info("wandb.teardown", exc_info=True)


def close_dead_files(run: Run, run_id: str) -> None:
    """Close the offline files that a killed process left open: the run goes on after each.

    The caller holds the run. A process that has lost the run and still writes its file writes to
    nowhere from then on.
    """
    for path in session_files(run.folder, run_id):
        if not is_header_only(path):
            append_preempted(path)
