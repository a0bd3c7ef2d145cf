"""W&B's own folders of a run: which of them a plain `wandb sync` may upload. Opens none of them.

An offline session is a folder of its own. `wandb sync` uploads them one after another and numbers
a row anew whose step it has seen before, so no two may hold the same step. So only sessions that
were closed, and are whole on the disk, count: the next one logs the rows past them. Any other (cut
by a kill, online, of the run that this one was copied from) is left out, and its rows come again.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flowjobs.runs.files import write_json
from flowjobs.runs.run import Run


@dataclass(frozen=True)
class OnRecord:
    """What W&B, or the folders that are for it, have of a run.

    Attributes:
        run_id: The run's id in W&B.
        step: The last step of it all; -1 without rows.
        folders: Names of the folders that hold it, as far as no server does.
        told: What the last sync told the server, to see that there is nothing new.
    """

    run_id: str
    step: int = -1
    folders: tuple[str, ...] = ()
    told: dict[str, Any] | None = None

    def with_session(self, folder: Path, step: int) -> "OnRecord":
        """The same and another closed session."""
        return replace(self, step=max(self.step, step), folders=(*self.folders, folder.name))


def read_on_record(run: Run, run_id: str) -> OnRecord:
    """What is on record of a run under an id; nothing if that is not noted."""
    try:
        found = json.loads(_file(run).read_text())
        noted = OnRecord(
            str(found["run_id"]), int(found["step"]), tuple(found["folders"]), found.get("told")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return OnRecord(run_id)
    return noted if noted.run_id == run_id else OnRecord(run_id)


def write_on_record(run: Run, on_record: OnRecord) -> None:
    """Note it. The caller holds the `upload_lock`, as for all that is noted there."""
    write_json(_file(run), asdict(on_record), flush=False)


def leave_out_others(run: Run, on_record: OnRecord) -> None:
    """Keep a plain `wandb sync` from the folders that hold nothing on record."""
    for path in session_files(run):
        if path.parent.name not in on_record.folders:
            path.with_name(f"{path.name}.synced").touch()  # as wandb marks what it has uploaded


def session_files(run: Run) -> list[Path]:
    """W&B's files of all sessions of a run."""
    return list(run.folder.glob("wandb/*run-*/run-*.wandb"))


def _file(run: Run) -> Path:
    return run.folder / "wandb" / "on_record.json"
