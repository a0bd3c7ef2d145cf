"""W&B's offline files of a run, as wandb's own reader, `wandb leet inspect`, shows them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowjobs.runs.run import Run


@dataclass(frozen=True)
class Inspected:
    """What the reader says of a session."""

    state: str
    exit_code: int | None
    tags: list[str]
    notes: str
    config: dict[str, Any]
    summary: dict[str, Any]


def session_files(run: Run) -> list[Path]:
    """The offline files that a plain `wandb sync` would upload, oldest session first."""
    found = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    return sorted(path for path in found if not path.with_name(f"{path.name}.synced").exists())


def inspect(path: Path) -> Inspected:
    """A session's state, labels, config and summary."""
    found = json.loads(_leet(path, "--summary"))
    state = found["state"]
    if state == "failed" and any(record["type"] == "preempting" for record in records(path)):
        state = "preempted"
    return Inspected(
        state=state,
        exit_code=found.get("exit_code"),
        tags=found.get("tags") or [],
        notes=found.get("notes", ""),
        config=found["config"],
        summary=found["summary"],
    )


def records(path: Path) -> list[dict[str, Any]]:
    """All records, in order."""
    return [json.loads(line) for line in _leet(path).splitlines()]


def history(path: Path) -> list[dict[str, Any]]:
    """The rows in the form of `metrics.jsonl`."""
    rows = []
    for record in records(path):
        if record["type"] == "history":
            item = record["history"]["item"]
            own = {key: value for key, value in item.items() if not key.startswith("_")}
            rows.append({"step": item["_step"], **own})
    return rows


def offline_rows(run: Run) -> list[dict[str, Any]]:
    """The history in all offline files of a run, in order, in the form of `metrics.jsonl`."""
    return [row for path in session_files(run) for row in history(path)]


def _leet(path: Path, *options: str) -> str:
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
    environment = {k: v for k, v in os.environ.items() if "WANDB" not in k}
    done = subprocess.run(
        [*command, *options, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return done.stdout
