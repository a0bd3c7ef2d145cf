"""`status.json`: what a run is doing, and each attempt at it; `outcome_of` names its end."""

import contextlib
import dataclasses
import itertools
import os
import socket
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flowjobs.errors import (
    ConfigError,
    FlowjobsError,
    NoProgressError,
    RankFailedError,
    RunInterrupted,
    TrainingDivergedError,
)
from flowjobs.from_json import from_json
from flowjobs.runs.files import read_json, warn_once, write_json
from flowjobs.runs.metrics import METRICS_FILE, latest_values
from flowjobs.runs.process import process_mark
from flowjobs.user_code import text_of, user_place

State = Literal["submitted", "running", "preempted", "finished", "failed", "cancelled"]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        state: The run's state from now on.
        exit_code: What the process returns; 0 only for a finished run.
        reason: Why, as a sentence; empty for a finished run.
        traceback: The traceback of an exception that is a bug, else empty.
        kind: The reason in a word or two, the same for all of its kind ("out of memory").
        ended: When, of an attempt that could not note it itself; None if that is not known.
    """

    state: State
    exit_code: int
    reason: str = ""
    traceback: str = ""
    kind: str = ""
    ended: str | None = None


# EX_TEMPFAIL of sysexits.h: not a failure, the same command resumes from here.
EXIT_PREEMPTED = 75
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_CANCELLED = 130

FINISHED = Outcome("finished", exit_code=0)


def cancelled_outcome(reason: str) -> Outcome:
    """The outcome of a cancelled run."""
    return Outcome("cancelled", EXIT_CANCELLED, reason, kind="cancelled")


CANCELLED = cancelled_outcome("cancelled by flowjobs cancel")

# How much of an error's text lists of runs show.
REASON_CHARACTERS = 500


def outcome_of(error: BaseException | None) -> Outcome:
    """The outcome of an attempt that ended with `error`, or with none."""
    match error:
        case None:
            return FINISHED
        case RunInterrupted(kind="cancelled"):
            return cancelled_outcome(str(error))
        case RunInterrupted():
            return Outcome("preempted", EXIT_PREEMPTED, str(error), kind=error.kind)
        case KeyboardInterrupt():
            return cancelled_outcome("interrupted by Ctrl-C")
        case NoProgressError():
            return Outcome("failed", error.exit_code, str(error), kind="no progress")
        case TrainingDivergedError():
            return Outcome("failed", error.exit_code, str(error), kind="diverged")
        case RankFailedError():
            code, text = error.exit_code, error.traceback
            return Outcome("failed", code, str(error), text, kind=error.kind)
        case FlowjobsError():
            return Outcome("failed", error.exit_code, str(error), kind="exception")
    text = "".join(traceback.format_exception(error))
    place = user_place(error)
    # Before the text, which may be long: W&B and a terminal show the begin.
    where = f" ({place})" if place else ""
    reason = f"{type(error).__name__}{where}: {_on_one_line(text_of(error))}"
    return Outcome("failed", EXIT_FAILED, reason, text, kind="exception")


def _on_one_line(text: str) -> str:
    """A text of anybody's, as a table and a terminal can show it; whole, it is in the traceback."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    line = " ".join(printable.split())
    return line if len(line) <= REASON_CHARACTERS else f"{line[:REASON_CHARACTERS]} …"


@dataclass(frozen=True)
class JobInfo:
    """Where an attempt runs.

    Attributes:
        cluster: "slurm", "local" or "debug"; "none": a process in the foreground; "reconcile": not
            a job, the lock's holder while a dead attempt is recorded.
        job_id: The scheduler's id (`12_3` for an array task), else the process id.
        log: The file that holds the attempt's output, if it has one.
        host: The node of rank 0.
        pid: The process of rank 0.
        gpus: CUDA_VISIBLE_DEVICES of rank 0, if the scheduler set it.
        restart: How often the scheduler has started this job again.
        continues: Whether the job was submitted by flowjobs itself, to continue an earlier one.
        ranks: Processes that train together; None if that was not noted.
        packed: Whether other runs share the job, so that its restart count says nothing about this
            run; `continues` says whether this is a first start.
        process: Tells the process from a later one of its id; see `process_mark`.
    """

    cluster: str
    job_id: str
    log: str | None
    host: str
    pid: int
    gpus: str | None = None
    restart: int = 0
    continues: bool = False
    ranks: int | None = None
    packed: bool = False
    process: str | None = None

    @property
    def restart_count(self) -> int:
        """How often the scheduler has started this job again, by Slurm's name for it."""
        return self.restart

    @property
    def start_id(self) -> str:
        """This start of the job, as text: "12-0"."""
        return f"{self.job_id}-{self.restart}"

    @property
    def description(self) -> str:
        """Where the attempt runs, as text: "slurm job 12 on n1", "process 345 on n1"."""
        if self.cluster == "none":
            return f"process {self.pid} on {self.host}"
        return f"{self.cluster} job {self.job_id} on {self.host}"

    @property
    def is_from_python(self) -> bool:
        """Whether a `FlowTrainer` opened the run itself: any other process of ours has a log."""
        return self.cluster == "none" and self.log is None

    @property
    def started_by_user(self) -> bool:
        """Whether this is the first start that the user asked for."""
        return not self.continues and (self.packed or self.restart == 0)

    @classmethod
    def in_foreground(cls, log: Path | None = None) -> "JobInfo":
        """This process, under no scheduler."""
        pid = os.getpid()
        log_file, host = str(log) if log else None, socket.gethostname()
        return cls("none", str(pid), log_file, host, pid, process=process_mark(pid))


def same_host(one: str, other: str) -> bool:
    """Whether two names are of one host: Slurm's name of a node has no domain, its own may have."""
    if "." in one and "." in other:
        return one == other
    return one.partition(".")[0] == other.partition(".")[0]


@dataclass
class AttemptRecord:
    """One start of the run, as `status.json` lists it. Times are UTC, in ISO 8601.

    Attributes:
        trains: When it was about to do its first step.
        saving_s: How long its training stood still for checkpoints.
        prepared: Chunks of reflow pairs that it wrote to disk: progress before the first step.
    """

    number: int
    job: JobInfo
    started: str
    first_step: int | None = None
    last_step: int | None = None
    ended: str | None = None
    state: State = "running"
    kind: str = ""
    reason: str = ""
    trains: str | None = None
    saving_s: float = 0.0
    prepared: int = 0

    def record_outcome(self, outcome: Outcome) -> None:
        """Note how the attempt ended."""
        self.ended = now()
        self.state, self.kind, self.reason = outcome.state, outcome.kind, outcome.reason


@dataclass
class RunStatus:
    """What a run is doing now, for everything that looks at it from outside.

    Attributes:
        extensions: When it was given more epochs or patience: {"step": 69, "epochs": [3, 6]}.
        model: The class of its model, `module:Name`, where its config does not name it: of one that
            was trained from Python. Else empty.
        model_code: A digest of the code of a model that was trained from Python; else empty.
        parameters: How many its model has; None before it has been built.
        flops_per_sample: Operations of the forward pass of one row; None if they are not known.
        diverged_after: The last step before rows that were lost and came again with other values.
        updated: When it was written; empty where no status is on disk, or a damaged one.
    """

    state: State = "submitted"
    reason: str = ""
    step: int = 0
    total_steps: int | None = None
    epoch: int = 0
    epochs: int | None = None
    patience: int | None = None
    best_val_loss: float | None = None
    exit_code: int | None = None
    traceback: str = ""
    extensions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    model: str = ""
    model_code: str = ""
    parameters: int | None = None
    flops_per_sample: int | None = None
    diverged_after: int | None = None
    updated: str = ""
    attempts: list[AttemptRecord] = dataclasses.field(default_factory=list)

    @property
    def open_attempt(self) -> AttemptRecord | None:
        """The newest attempt, if nobody has said yet how it ended."""
        newest = self.attempts[-1] if self.attempts else None
        return newest if newest and newest.ended is None else None

    @property
    def outcome(self) -> Outcome | None:
        """How the newest attempt ended; None if there was none, or nobody has said so yet."""
        if self.state in ("submitted", "running"):
            return None
        kind = self.attempts[-1].kind if self.attempts else ""
        return Outcome(self.state, self.exit_code or 0, self.reason, self.traceback, kind)

    @property
    def was_begun_in_python(self) -> bool:
        """Whether a `FlowTrainer` began the run."""
        first = next(iter(self.attempts), None)
        return first is not None and first.job.is_from_python

    def catch_up(self, metrics_file: Path) -> None:
        """Bring the open attempt up to its newest row, which reaches the disk before the status."""
        attempt = self.open_attempt
        # Before its first step, the rows are those of the attempt before it.
        if attempt and attempt.first_step is not None:
            with contextlib.suppress(OSError):  # its own word must do
                newest = latest_values(metrics_file).get("step", 0)
                attempt.last_step = max(attempt.last_step or 0, newest)

    def record_outcome(self, outcome: Outcome) -> None:
        """Note how the newest attempt ended: that is the run's state from now on."""
        if self.open_attempt:
            self.open_attempt.record_outcome(outcome)
        self.state, self.exit_code = outcome.state, outcome.exit_code
        self.reason, self.traceback = outcome.reason, outcome.traceback

    def record_outcome_of_dead(self, outcome: Outcome, metrics_file: Path) -> None:
        """The same of an attempt that could not note it itself, and may have ended long ago.

        It ended when its job did, as far as that is known, else when it was last heard of.
        """
        attempt, heard = self.open_attempt, outcome.ended or self.heard(metrics_file)
        self.record_outcome(outcome)
        if attempt and attempt.ended:
            # Neither before it began nor later than now, which other clocks may say.
            attempt.ended = max(attempt.started, min(heard, attempt.ended))

    def heard(self, metrics_file: Path) -> str:
        """When the run was last heard of: by its status, or by its newest row."""
        with contextlib.suppress(OSError):
            return max(self.updated, utc(metrics_file.stat().st_mtime))
        return self.updated

    def write(self, path: Path, *, flush: bool = True) -> None:
        """Replace the file at `path`; without `flush`, not waiting for the disk."""
        self.updated = now()
        write_json(path, dataclasses.asdict(self), flush=flush)


def read_status(path: Path) -> RunStatus:
    """The status at `path`; that of a new run before the first attempt.

    A file that is damaged counts as none, with a warning: what the run resumes from is its
    checkpoint.
    """
    try:
        return read_sound_status(path)
    except ConfigError as error:
        warn_once(str(error))
        return RunStatus()


def read_sound_status(path: Path) -> RunStatus:
    """The same; fields of a newer version are left out. The rows beside it may know of more steps.

    Raises:
        ConfigError: The file is damaged.
    """
    try:
        status = from_json(RunStatus, read_json(path))
        times = [(each.started, each.ended, each.trains) for each in status.attempts]
        for text in (status.updated, *itertools.chain(*times)):
            _check_time(text)
        status.catch_up(path.with_name(METRICS_FILE))
        return status
    except FileNotFoundError:
        return RunStatus()
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}) and is ignored; submit the run again, its next attempt "
            "writes a new one"
        ) from error


def _check_time(text: str | None) -> None:
    if text is not None and datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"found the time {text!r}, expected one with its offset from UTC")


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return utc(time.time())


def utc(seconds: float) -> str:
    """A time in seconds of the epoch as `now` gives it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
