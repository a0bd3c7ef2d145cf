"""Base of Run and Pack: a folder that jobs are submitted for, and its jobs.jsonl."""

import contextlib
import json
import logging
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self, get_type_hints

from flowjobs.config import SlurmConfig
from flowjobs.errors import LockHeldError
from flowjobs.from_json import value_from_json
from flowjobs.runs.file_lock import locked
from flowjobs.runs.files import append_line, warn_once
from flowjobs.runs.status import AttemptRecord, now

logger = logging.getLogger(__name__)

# Longer than sbatch may take, and the search for a job that it has not told of.
SUBMIT_WAIT_S = 300.0
SUBMIT_LOCK = ".submit.lock"

# In `logs/`: what a job does; and the batch file of one that is submitted and not noted yet.
TASK = "task.pkl"
BATCH_FILE = "submission.sh"

# How far the clocks of two machines may differ.
CLOCKS = timedelta(minutes=5)


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, as a line of `jobs.jsonl` has it.

    Attributes:
        job_id: The scheduler's id (`12_3` for an array task).
        cluster: "slurm", "local" or "debug".
        submitted: When it was noted; empty of one that was not.
        log: The file that the run's output goes to; empty if that is not known.
        host: Where it was submitted.
        uid: Whose it is; None if that is not known.
        process: Tells a job on this machine from a later one of its id (`process_mark`).
        job_name: The job's name.
        slurm_cluster: Slurm's name of its cluster; empty if that is not known.
        mark: Ours, that Slurm gives back; empty for a job that was submitted by hand.
        handed_over: When sbatch accepted it, in seconds of the epoch; 0 if that is not known.
        job_log: Where the job's own output goes, if that is another file (of a job that runs share,
            or whose errors go to a file of their own); else empty.
        array: The folder of the array whose task it is; empty if it is none.
        pack: The pack that shares it; empty if it is the run's own.
        continues: The job that it continues, if flowjobs itself submitted it.
        again: The command that submits the same job again, if it was submitted by hand.
        script_arguments: Those of the batch script of a job by hand whose command is not known, as
            Slurm did not say; None of any other job.
    """

    job_id: str
    cluster: str
    submitted: str
    log: str
    host: str = ""
    uid: int | None = None
    process: str | None = None
    job_name: str = ""
    slurm_cluster: str = ""
    mark: str = ""
    handed_over: float = 0.0
    job_log: str = ""
    array: str = ""
    pack: str = ""
    continues: str = ""
    again: list[str] = field(default_factory=list)
    script_arguments: list[str] | None = None


def attempts_of(job: Submission, attempts: Iterable[AttemptRecord]) -> list[AttemptRecord]:
    """Those of a run's attempts that are of a job, and of no earlier one that had its id.

    A cluster whose controller lost its state uses ids again, and so does a machine.
    """
    own = [attempt for attempt in attempts if attempt.job.job_id == job.job_id]
    if job.array or not job.submitted:  # it may have been noted long after it has begun
        return own
    earliest = datetime.fromisoformat(job.submitted) - CLOCKS
    return [attempt for attempt in own if attempt.started >= earliest.isoformat()]


@dataclass(frozen=True)
class Submittable(ABC):
    """A folder of a study with its jobs: their logs, and a line for each.

    Attributes:
        study: Root of the study.
        name: The folder's, and that of its jobs.
    """

    study: Path
    name: str

    @classmethod
    def at(cls, folder: Path) -> Self:
        """The one whose folder is `folder`: the inverse of `folder`."""
        return cls(study=folder.parent.parent, name=folder.name)

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where it is."""

    @abstractmethod
    def asked(self) -> SlurmConfig:
        """What its jobs ask of the cluster."""

    @abstractmethod
    def cancel_requested(self) -> bool:
        """Whether its user wants no job of it any more."""

    @abstractmethod
    def starts_of(self, job_id: str) -> int:
        """How often a job of it has been started so far."""

    @property
    def jobs_file(self) -> Path:
        """A line a submission."""
        return self.folder / "jobs.jsonl"

    @property
    def logs(self) -> Path:
        """Batch files and output of the jobs."""
        return self.folder / "logs"

    def removed(self) -> bool:
        """Whether its folder is gone; where the whole study is away, that is not said."""
        return self.folder.parent.exists() and not self.folder.exists()

    @property
    def batch_file(self) -> Path:
        """That of a job that sbatch is handed; moved to its id once it is noted."""
        return self.logs / BATCH_FILE

    @contextlib.contextmanager
    def one_submits(self) -> Iterator[None]:
        """Keep others from submitting, from the look for a job until the new one is noted.

        Only so that no second job is submitted, which would train nothing: one that hangs, or a
        lock that cannot be had, keeps nobody from submitting for good. Makes the folder.
        """
        with contextlib.ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                purpose = f"to submit {self.name}"
                held.enter_context(locked(self.folder / SUBMIT_LOCK, SUBMIT_WAIT_S, purpose))
            except LockHeldError as error:
                logger.warning("%s; submitting all the same", error)
            except OSError as error:  # what is to be written there soon says it better
                logger.debug("%s is submitted without a lock: %s", self.name, error)
            yield

    def output_of(self, job_id: str) -> Path:
        """What a job of it prints, as submitit calls it."""
        return self.logs / f"{job_id}_0_log.out"

    def log_at(self, path: str) -> Path:
        """A log by the path that it had when it was written: the study may have been moved since,
        with `logs/` in it."""
        # Not Path.exists: it may have been in a home that is closed to whoever has the study now.
        return Path(path) if os.path.exists(path) else self.logs / Path(path).name

    def origin_file(self, job_id: str) -> Path:
        """What a job was submitted from, readable by its user alone."""
        return self.logs / f"{job_id}_origin.json"

    def submissions(self) -> list[Submission]:
        """Every job that was submitted, oldest first; damaged lines are left out, and said."""
        try:
            lines = self.jobs_file.read_text(errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        entries = []
        for line in lines:
            try:
                entries.append(_read(line))
            except (ValueError, TypeError, RecursionError):
                continue
        if damaged := len(lines) - len(entries):  # torn by a full disk
            warn_once(f"{self.jobs_file}: {damaged} lines are damaged and left out")
        # A job may be noted by itself, where a node may not ask for its mark, and its submitter.
        once = {(_job(e), e.mark or number): e for number, e in enumerate(entries)}
        marked = {_job(entry) for entry in entries if entry.mark}
        return [e for e in once.values() if e.mark or _job(e) not in marked]

    def newest_job(self) -> Submission | None:
        """The job that was submitted last; None if there was none."""
        return next(reversed(self.submissions()), None)

    def submission(self, job_id: str, slurm_cluster: str = "") -> Submission | None:
        """The newest job that was submitted under this id; None if there was none.

        Args:
            job_id: The scheduler's id.
            slurm_cluster: Slurm's name of its cluster, if that is known: two clusters on one home
                use the same ids.
        """
        found = [entry for entry in self.submissions() if entry.job_id == job_id]
        if slurm_cluster:
            here = ("", slurm_cluster)
            found = [entry for entry in found if entry.slurm_cluster in here]
        return found[-1] if found else None

    def add_submission(
        self,
        job_id: str,
        cluster: str,
        log: Path | None,
        *,
        continues: str | None = None,
        again: Sequence[str] = (),
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Note that a job was submitted.

        Args:
            job_id: The scheduler's id.
            cluster: "slurm", "local" or "debug".
            log: The file that its output goes to.
            continues: The job that it continues, if flowjobs itself submitted it.
            again: The command that submits the same job again, if it was submitted by hand.
            identity: What else tells it from others: of a Slurm job see JobIdentity, of one on
                this machine its `process`, as JobInfo has it.
        """
        here = {"host": socket.gethostname(), "uid": os.getuid()}
        entry = Submission(
            job_id,
            cluster,
            now(),
            str(log or ""),
            continues=continues or "",
            again=list(again),
            **{**here, **(identity or {})},
        )
        append_line(self.jobs_file, json.dumps(asdict(entry)))


_TYPES = get_type_hints(Submission)


def _read(line: str) -> Submission:
    found = json.loads(line)
    known = {}
    for name, hint in _TYPES.items():
        # What is of another type is as good as not known.
        with contextlib.suppress(ValueError, KeyError):
            known[name] = value_from_json(hint, found[name])
    return Submission(**known)


def _job(entry: Submission) -> tuple[str, str]:
    return entry.job_id, entry.slurm_cluster
