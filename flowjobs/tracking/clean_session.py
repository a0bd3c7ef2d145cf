"""One clean W&B session of a run, made of what is on disk, for the steps a server lacks.

The rows are those of `metrics.jsonl`. From the run's own sessions come what only they have: the
config, the definitions of metrics, the times of the rows, pictures, system metrics, the summary.
These overlap where an attempt repeated steps, lack what was not flushed, and may be damaged; none
of them is changed. Knows of no server but what it has.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowjobs.runs.metrics import Row, read_rows
from flowjobs.runs.run import Run
from flowjobs.tracking.identity import config_for_wandb
from flowjobs.tracking.mirror import summary_of
from flowjobs.tracking.offline_files import read_records, record_of, write_records
from flowjobs.tracking.session import LOWEST, PICTURE, read_session

KeyPath = tuple[str, ...]


@dataclass
class Recorded:
    """What a run's sessions have on record; the newest one's word counts.

    Attributes:
        header: Which wandb wrote it.
        run: The newest run record, with config, tags and notes.
        beside_run: What sessions say of their machine and config beside it, the newest that does.
        metrics: Definitions by the metric's name.
        times: `_timestamp` and `_runtime` of each step; `_runtime` goes on from session to session.
        pictures: Items of media by step.
        summary: Values as JSON, by their path.
        stats: System metrics.
        files: Where each file is, by its name.
    """

    header: Any = None
    run: Any = None
    beside_run: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    times: dict[int, tuple[float, float]] = field(default_factory=dict)
    pictures: dict[int, list[Any]] = field(default_factory=dict)
    summary: dict[KeyPath, str] = field(default_factory=dict)
    stats: list[Any] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Ending:
    """How the session that is made ends.

    Attributes:
        exit_code: 0 finished; else failed, or preempted with `preempting`.
    """

    exit_code: int
    preempting: bool
    tags: Sequence[str]
    notes: str


def tracked_files(run: Run) -> list[Path]:
    """W&B's files of the run's sessions, online and offline, oldest first."""
    name = f"run-{run.tracking_id()}.wandb"
    found = run.folder.glob(f"wandb/*run-*/{name}")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def read_sessions(files: Sequence[Path]) -> Recorded:
    """All that can be read of these sessions, given oldest first."""
    recorded = Recorded()
    for path in files:
        _read_session(recorded, path)
    return recorded


def write_clean_session(
    run: Run,
    recorded: Recorded,
    folder: Path,
    *,
    after_step: int,
    after_event_s: float,
    ending: Ending,
) -> list[int]:
    """Write a session with the rows past `after_step` to `folder`, with the files it names.

    Args:
        run: Its `metrics.jsonl` has the rows.
        recorded: What its sessions have.
        folder: Is made; the file in it is `run-ID.wandb`.
        after_step: The last step that the server has.
        after_event_s: Time of the last system metrics that it has, in seconds of the epoch.
        ending: How the session ends.

    Returns:
        The steps of the rows in it, in order.
    """
    rows = {row["step"]: row for row in read_rows(run.metrics_file)}
    finished = ending.exit_code == 0 and not ending.preempting
    if finished and rows and not any(path[0] == PICTURE for path in recorded.summary):
        _add_picture(run, recorded, max(rows))
    steps = sorted(step for step in {*rows, *recorded.pictures} if step > after_step)
    (folder / "files").mkdir(parents=True)
    for name, source in recorded.files.items():
        target = folder / "files" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def records() -> Iterator[Any]:
        if recorded.header:
            yield recorded.header
        yield _run_record(run, recorded, ending)
        for said in recorded.beside_run.values():
            yield from said
        yield from (recorded.metrics or _definitions()).values()
        for stats in recorded.stats:
            if _seconds(stats.stats.timestamp) > after_event_s:
                yield stats
        yield from _history(recorded, {step: rows.get(step, {}) for step in steps})
        yield _summary(run, recorded, rows)
        if recorded.files:
            files = record_of()
            for name in recorded.files:
                files.files.files.add(path=name)
            yield files
        if ending.preempting:
            preempting = record_of()
            preempting.preempting.SetInParent()
            yield preempting
        end = record_of()
        end.exit.exit_code = ending.exit_code
        yield end

    write_records(folder / f"run-{run.tracking_id()}.wandb", records())
    return steps


def _read_session(recorded: Recorded, path: Path) -> None:
    ran_before = max((runtime for _, runtime in recorded.times.values()), default=0.0)
    beside_run: dict[str, list[Any]] = {}
    names_a_run = False
    for record in read_records(path):
        match record.WhichOneof("record_type"):
            case "header":
                recorded.header = record
            case "run":
                _keep_config(recorded.run, record)
                recorded.run, names_a_run = record, True
            case "environment" | "config" as kind:
                beside_run.setdefault(kind, []).append(record)
            case "metric":
                recorded.metrics[record.metric.name or record.metric.glob_name] = record
            case "history":
                _read_history(recorded, record, ran_before)
            case "summary":
                recorded.summary |= {_path(i): i.value_json for i in record.summary.update}
            case "stats":
                recorded.stats.append(record)
            case "files":
                names = [item.path for item in record.files.files]
                found = {name: path.parent / "files" / name for name in names}
                recorded.files |= {name: file for name, file in found.items() if file.is_file()}
    if names_a_run:
        recorded.beside_run |= beside_run


def _keep_config(before: Any, record: Any) -> None:
    """Config that a session did not say again: one that only tells a death knows no machine."""
    if before is None:
        return
    said = {(item.key, *item.nested_key) for item in record.run.config.update}
    kept = [i for i in before.run.config.update if (i.key, *i.nested_key) not in said]
    record.run.config.update.extend(kept)


def _read_history(recorded: Recorded, record: Any, ran_before: float) -> None:
    step = record.history.step.num
    items = {_path(item): item for item in record.history.item}
    timestamp, runtime = items.get(("_timestamp",)), items.get(("_runtime",))
    if timestamp and runtime and step not in recorded.times:
        recorded.times[step] = (
            float(timestamp.value_json),
            ran_before + float(runtime.value_json),
        )
    media = {path[0] for path in items if path[1:] == ("_type",)}
    if media:
        recorded.pictures[step] = [item for path, item in items.items() if path[0] in media]


def _add_picture(run: Run, recorded: Recorded, step: int) -> None:
    """The picture of a run that no session could tell: its server was away to the end.

    As `wandb.Image` puts it on record, with the step that it is logged with.
    """
    from PIL import Image

    try:
        content = run.samples_picture.read_bytes()
        with Image.open(run.samples_picture) as picture:
            width, height = picture.size
    except OSError:
        return  # there is none, or none that can be shown
    digest = hashlib.sha256(content).hexdigest()
    name = f"media/images/{PICTURE}_{step}_{digest[:20]}.png"
    values = {
        "_type": "image-file",
        "sha256": digest,
        "size": len(content),
        "path": name,
        "format": "png",
        "width": width,
        "height": height,
    }
    history = record_of().history
    for key, value in values.items():
        history.item.add(nested_key=[PICTURE, key], value_json=json.dumps(value))
    recorded.pictures[step] = list(history.item)
    recorded.summary |= {_path(item): item.value_json for item in history.item}
    recorded.files[name] = run.samples_picture


def _run_record(run: Run, recorded: Recorded, ending: Ending) -> Any:
    record = record_of(recorded.run.SerializeToString() if recorded.run else b"")
    record.ClearField("control")
    own = record.run
    if not recorded.run:
        # No session lived long enough to say what it is of.
        config = run.config()
        own.run_id, own.display_name = run.tracking_id(), run.name
        own.project = config.tracking.wandb_project
        own.entity = config.tracking.wandb_entity or ""
        own.run_group = config.training.group or ""
        own.start_time.GetCurrentTime()
        for key, value in config_for_wandb(run).items():
            own.config.update.add(key=key, value_json=json.dumps(value))
    own.resume = True
    own.tags[:] = ending.tags
    own.notes = ending.notes
    return record


def _definitions() -> dict[str, Any]:
    records = {}
    for name in LOWEST:
        record = records[name] = record_of()
        record.metric.name = name
        record.metric.summary.min = True
        record.metric.options.defined = True
    return records


def _history(recorded: Recorded, rows: Mapping[int, Row]) -> Iterator[Any]:
    # A row that only `metrics.jsonl` has took place right after the one before it.
    time_and_runtime = min(recorded.times.values(), default=None)
    for step, row in rows.items():
        time_and_runtime = recorded.times.get(step, time_and_runtime)
        record = record_of()
        record.history.step.num = step
        values = {"_step": step, **{key: row[key] for key in row if key != "step"}}
        if time_and_runtime:
            values["_timestamp"], values["_runtime"] = time_and_runtime
        for key, value in values.items():
            record.history.item.add(nested_key=[key], value_json=json.dumps(value))
        record.history.item.extend(recorded.pictures.get(step, ()))
        yield record


def _summary(run: Run, recorded: Recorded, rows: Mapping[int, Row]) -> Any:
    """As one uninterrupted session would leave it: each session knows only its own rows."""
    said = read_session(run)
    values = summary_of(rows[step] for step in sorted(rows)) | (said.summary if said else {})
    record = record_of()
    for path, value_json in recorded.summary.items():
        if path[0] not in values:
            record.summary.update.add(nested_key=path, value_json=value_json)
    for key, value in values.items():
        record.summary.update.add(nested_key=[key], value_json=json.dumps(value))
    return record


def _path(item: Any) -> KeyPath:
    return tuple(item.nested_key) or (item.key,)


def _seconds(timestamp: Any) -> float:
    return float(timestamp.seconds + timestamp.nanos / 1e9)
