"""All runs of a study at a glance: two files a run are read, or none where an index knows them.

The index is a cache in the user's cache folder: it is used for what has not changed since, as the
times and sizes of the files say, and deleting it changes nothing: what could not be read is not in
it. A study of few runs has none.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.runs.files import read_json, replaced_whole
from flowjobs.runs.run import Run, folder_names, has_done, leads_nowhere
from flowjobs.runs.status import RunStatus, State
from flowjobs.runs.submittable import CLOCKS

VERSION = 2
# Fewer are read in no time.
INDEX_FROM = 200
# A file that is written again within this time may keep its time and size.
SETTLED_AFTER_NS = 2_000_000_000
FILES = ("config.json", "status.json", "jobs.jsonl")

# Time and size of each of FILES; 0 where there is none.
Stamp = list[int]


@dataclass(frozen=True)
class Glance:
    """A run, as far as a line of an overview needs it.

    Attributes:
        name: Its name.
        group: Its group in W&B.
        state: As `status.json` says; "unknown" if that cannot be read.
        reason: Why, or what is wrong with its files.
        kind: The reason in a word or two.
        epoch: Epochs that are done.
        epochs: How many it is to have, at most.
        trained_s: How long its attempts took together, as far as they have ended, and the last one
            until it was heard of.
        unsettled: Whether a job of it may wait or run, or have ended unnoticed.
    """

    name: str
    group: str
    state: str
    reason: str = ""
    kind: str = ""
    epoch: int = 0
    epochs: int = 0
    trained_s: float = 0.0
    unsettled: bool = False


def glances(study: Path, names: Sequence[str] | None = None) -> list[Glance]:
    """The runs of a study, by their names.

    Args:
        study: Its root.
        names: Those to look at; None: all.
    """
    if names is None:
        names = folder_names(study / "runs")
    index = _Index(study) if len(names) >= INDEX_FROM else None
    known = index.entries if index else {}
    found, news = [], {}
    for name in names:
        try:
            stamp = _stamp(study / "runs" / name)
        except OSError as error:
            found.append(Glance(name, "", "unknown", str(error)))
            continue
        if not (stamp[0] or stamp[2] or leads_nowhere(study / "runs" / name)):
            continue  # a folder that is no run
        before = known.get(name)
        if before and before[0] == stamp:
            glance = Glance(name, *before[1])
        else:
            glance = _look(Run(study, name), stamp)
            # What kept it from being read may pass, and leaves no mark on the files.
            settled = max(stamp[0::2]) < time.time_ns() - SETTLED_AFTER_NS
            if settled and glance.state != "unknown":
                news[name] = (stamp, list(dataclasses.astuple(glance)[1:]))
        found.append(glance)
    if index and news:
        index.write(news, names)
    return found


def _stamp(folder: Path) -> Stamp:
    stamp = []
    for name in FILES:
        try:
            found = os.stat(f"{folder}/{name}")
            stamp += [found.st_mtime_ns, found.st_size ^ found.st_ino << 40]
        except (FileNotFoundError, NotADirectoryError):
            stamp += [0, 0]
    return stamp


def _look(run: Run, stamp: Stamp) -> Glance:
    group, epochs, patience = "", 0, 0
    try:
        training = run.read_config_file()["training"]
        default = TrainingConfig()
        group = str(training.get("group", default.group))
        epochs = int(training.get("epochs", default.epochs))
        patience = int(training.get("patience", default.patience))
        if not stamp[2]:
            return Glance(run.name, group, "submitted", epochs=epochs, unsettled=bool(stamp[4]))
        status = read_json(run.status_file)
        attempts = status["attempts"]
        state, newest = status["state"], attempts[-1] if attempts else {}
        if state not in get_args(State):
            raise ConfigError(f"{run.status_file} is damaged (found state {state!r})")
        ended = newest.get("ended")
        length: dict[str, Any] = {key: status.get(key) for key in ("epochs", "patience")}
        done = has_done(RunStatus(state, epoch=status["epoch"], **length), epochs, patience)
        ended_s = _seconds(ended) if ended else 0.0
        submitted_since = stamp[4] / 1e9 > ended_s - CLOCKS.total_seconds()
        return Glance(
            run.name,
            group,
            state,
            str(status.get("reason", "")),
            str(newest.get("kind", "")),
            int(status["epoch"]),
            epochs,
            sum(_duration_s(attempt, status["updated"]) for attempt in attempts),
            # A preempted one waits for its job; of the others a newer job may be on its way.
            bool(attempts and not ended)
            or (bool(stamp[4]) and not done and (state == "preempted" or submitted_since)),
        )
    except Exception as error:  # whatever is wrong with one, the others are shown
        words = str(error) or type(error).__name__
        if not isinstance(error, OSError) and str(run.folder) not in words:
            words = f"{run.folder}: {type(error).__name__}: {words}"
        return Glance(run.name, group, "unknown", words, epochs=epochs)


def _duration_s(attempt: Mapping[str, Any], updated: str) -> float:
    end = attempt.get("ended") or updated
    return max(0.0, _seconds(end) - _seconds(attempt["started"]))


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


class _Index:
    """What was seen of the runs of a study before, with the stamps of their files."""

    def __init__(self, study: Path) -> None:
        digest = hashlib.sha256(os.path.realpath(study).encode(errors="replace")).hexdigest()[:16]
        self._file = cache_folder() / f"index-{digest}.json"
        self.entries: dict[str, tuple[Stamp, list[Any]]] = {}
        try:
            found = read_json(self._file)
            width = len(dataclasses.fields(Glance)) - 1
            if found["version"] == VERSION and found["width"] == width:
                self.entries = found["runs"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or one of another version

    def write(self, news: Mapping[str, tuple[Stamp, list[Any]]], names: Sequence[str]) -> None:
        """Add what is new, and forget the runs that are gone. Failing to changes nothing."""
        there = set(names)
        entries = {name: old for name, old in self.entries.items() if name in there} | {**news}
        content = {"version": VERSION, "width": len(dataclasses.fields(Glance)) - 1}
        text = json.dumps({**content, "runs": entries}, separators=(",", ":"))
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_whole(self._file, flush=False, mode=0o600) as file:
                file.write(text.encode())


def cache_folder() -> Path:
    """Where this user's caches of flowjobs are: `$XDG_CACHE_HOME/flowjobs`, else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "flowjobs"
