"""An open session of a run in W&B, online or in an offline file. Loads wandb.

Its methods may raise whatever wandb raises, and may take long when a server does not answer.
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowjobs.errors import TrackingError
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome
from flowjobs.tracking import record
from flowjobs.tracking.mode import ResolvedMode, check_server_answers, server_of
from flowjobs.tracking.page import LOWEST, config_for_wandb, is_of_an_end, labels_for, summary_of
from flowjobs.tracking.process import upload_limit_s

# wandb makes two temporary folders as it is imported, for what is not told here, and would remove
# them in hooks that a mirror does not wait for.
with tempfile.TemporaryDirectory() as tempfile.tempdir:
    import wandb
    import wandb.errors
    from wandb.apis.public.runs import Run as RunOnServer
    from wandb.apis.public.runs import RunNotFoundError
tempfile.tempdir = None

API_TIMEOUT_S = 10
# A hard kill loses what wandb has not flushed to its file: by default 15 s of everything.
FLUSH_INTERVAL_S = 0.25
# After a session was cut, the server may still be taking in the last of it.
SETTLED_AFTER_S = 2.0

# What the picture of a finished run is called beside the metrics.
PICTURE = "samples"


class WandbSession:
    """Opens a session of the run: the same W&B run each time, with its identity complete.

    Args:
        run: The run.
        mode: Where to.
        trains_here: Whether the attempt runs on this machine; else only its end is told.

    Attributes:
        last_step: The last step that W&B has; -1 if it has none.
    """

    def __init__(self, run: Run, mode: ResolvedMode, *, trains_here: bool) -> None:
        self._tracked = run
        self._online = mode == "online"
        run_id = run.ensure_tracking_id()
        self._uploaded = replace(record.read_uploaded(run), refusal=None)
        # What a parent process, or a session before, left here would be joined.
        os.environ.pop("WANDB_SERVICE", None)
        config, tracking = run.config().training, record.tracking_of(run)
        server, entity = server_of(tracking), record.entity_of(run)
        if self._online:
            check_server_answers(server)
            _wait_for_killed_session(run)
        else:
            record.write_uploaded(run, self._uploaded)  # before there is a folder that is to stay
        names = (tracking.wandb_project, run.name, config.group)
        is_named = self._uploaded.named == (server, entity, *names)
        self._run = wandb.init(
            project=tracking.wandb_project,
            entity=entity or None,
            group=None if is_named else config.group,
            name=None if is_named else run.name,
            id=run_id,
            config=config_for_wandb(run),
            dir=run.folder,
            mode=mode,
            # An attempt resumes the run that the one before it left.
            resume="allow",
            settings=_settings(run, trains_here),
        )
        self.last_step = self._uploaded.step
        if self._online:
            self.last_step = self._run.starting_step - 1
            with suppress(OSError):  # a link is missing in a report, no more
                run.wandb_page_file.write_text(f"{self._run.url}\n")
            # The server gets the folders' rows now.
            named = (server, entity or self._run.entity, *names)
            self._uploaded = replace(self._uploaded, step=self.last_step, folders=(), named=named)
            record.write_uploaded(run, self._uploaded)
        self._logged_bytes = 0
        for metric in LOWEST:
            self._run.define_metric(metric, summary="min")
        tags, notes = self._run.tags or (), self._run.notes or ""
        self._run.tags, self._run.notes = labels_for(None, run.status(), tags, notes)

    def log(self, row: Mapping[str, Any], timestamp: float, picture: Path | None = None) -> None:
        """Put one row of `metrics.jsonl` on record, with a picture in it if there is one.

        Args:
            timestamp: When the row was written, in seconds of the epoch.
        """
        values = {key: value for key, value in row.items() if key != "step"}
        values["_timestamp"] = timestamp
        self._logged_bytes += len(json.dumps(values))
        if picture is not None:
            values[PICTURE] = wandb.Image(str(picture))
        # With commit the row is on record now; without, only when the next step is logged.
        self._run.log(values, step=row["step"], commit=True)
        self.last_step = row["step"]

    def finish(self, outcome: Outcome, picture: Path | None) -> None:
        """Say how the attempt ended, with a picture that no row holds; wait until it is on record.

        Raises:
            TimeoutError: The server does not take it.
            TrackingError: The disk does not, or the run was deleted in the web page.
        """
        summary = summary_of(self._tracked)
        for key in dict(self._run.summary).keys() - summary.keys():
            if is_of_an_end(key):  # an earlier one, before the run was extended
                del self._run.summary[key]  # type: ignore[no-untyped-call]
        self._run.summary.update(summary)
        if picture is not None and PICTURE not in dict(self._run.summary):
            self._run.summary[PICTURE] = wandb.Image(str(picture))
        tags, notes = self._run.tags or (), self._run.notes or ""
        # Since the session began its user may have written there, or have deleted the run.
        if self._online:
            with suppress(wandb.Error):  # no answer
                there = run_on_server(self._tracked)
                if there is None:
                    # wandb says nothing of that: it sends rows to nobody, and "succeeds".
                    raise TrackingError(f"run {self._run.id} was {record.DELETED}")
                tags, notes = there.tags, there.notes or ""
        labels = labels_for(outcome, self._tracked.status(), tags, notes)
        self._run.tags, self._run.notes = labels
        # A cancelled run is neither finished nor failed; like a preempted one it may be resumed.
        if outcome.state in ("preempted", "cancelled"):
            self._run.mark_preempting()
        file = Path(self._run.settings.sync_file)
        size = file.stat().st_size if file.exists() else 0
        self._run.finish(exit_code=outcome.exit_code)
        folders = self._uploaded.folders
        if not self._online:
            wandb.teardown()  # `finish` may return before the end is on the disk
            # wandb says nothing of a full disk, and writes nothing more once a write has failed.
            if not file.stat().st_size > max(size, self._logged_bytes):
                raise TrackingError(f"{file} is not complete: is the disk full?")
            folders = (*folders, file.parent.name)
        uploaded = replace(self._uploaded, step=self.last_step, folders=folders)
        record.write_uploaded(self._tracked, uploaded)


def _settings(run: Run, trains_here: bool) -> wandb.Settings:
    return wandb.Settings(
        x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        finish_timeout=upload_limit_s(run),
        finish_timeout_raises=True,
        # The end is told after the files, whose store may be out of reach for ever. Tried twice,
        # one that does not arrive leaves time for it, of which the end of an attempt has little.
        x_file_transfer_retry_max=1,
        x_file_transfer_retry_wait_max_seconds=1,
        x_file_transfer_timeout_seconds=5 if trains_here else 15,
        x_stats_pid=os.getppid(),
        # What wandb finds out of this machine says nothing of one that trained.
        x_disable_meta=not trains_here,
        x_disable_stats=not trains_here,
        disable_git=True,  # the config has it
        console="off",
        silent=True,
    )


def run_on_server(run: Run) -> RunOnServer | None:
    """The run as the server has it; None if it has no such run.

    Raises:
        wandb.Error: It does not say.
    """
    place = [record.entity_of(run), run.config().tracking.wandb_project, run.tracking_id()]
    try:
        return wandb.Api(timeout=API_TIMEOUT_S).run("/".join(filter(None, place)))
    except wandb.errors.CommError as error:
        if isinstance(error.exc, RunNotFoundError):
            return None
        raise


def missing_on_server(run: Run, last_step: int, outcome: Outcome | None = None) -> str:
    """What the server lacks of a run that has ended, in words; "" if it has all.

    Args:
        run: The run.
        last_step: The last row's.
        outcome: Also look at the tags and notes, which are to show this outcome.
    """
    there = run_on_server(run)
    if there is None:
        return "the run"
    if there.lastHistoryStep < last_step:
        return f"rows to step {there.lastHistoryStep} of {last_step}"
    if there.state in ("running", "pending", "crashed"):
        return f"the run's end: its state is {there.state}"
    if outcome is not None:
        tags, notes = labels_for(outcome, run.status(), there.tags, there.notes or "")
        if set(tags) != set(there.tags) or notes != (there.notes or ""):
            return "the run's tags and notes"
    return ""


def tear_down_wandb() -> None:
    """Forget everything of a session that broke, so that another one can begin."""
    with suppress(Exception, SystemExit):
        wandb.teardown()


def may_succeed_at_once(error: Exception) -> bool:
    """Whether a new session may do: wandb's own process died, and not a server that refuses."""
    return not isinstance(error, wandb.Error | TrackingError | TimeoutError)


def _wait_for_killed_session(run: Run) -> None:
    """Wait until the server has taken in what a session sent that was killed a moment ago."""
    online = [path for path in record.session_files(run) if path.parent.name.startswith("run-")]
    cut_at = max((path.stat().st_mtime for path in online), default=0.0)
    time.sleep(min(max(0.0, cut_at + SETTLED_AFTER_S - time.time()), SETTLED_AFTER_S))
