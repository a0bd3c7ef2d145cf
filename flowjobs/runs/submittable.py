"""What jobs are submitted for, and which: of a run, and of a pack of runs that share one."""

import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowjobs.config import SlurmConfig
from flowjobs.runs.files import append_line, warn_once
from flowjobs.runs.status import now

# What every line of jobs.jsonl has.
SUBMISSION_KEYS = ("job_id", "cluster", "submitted", "log")

# In `logs/`: what a job does; and the batch file of one that is handed over and not noted yet.
TASK = "task.pkl"
BATCH_FILE = "submission.sh"


class Submittable(ABC):
    """A folder of a study with its jobs: their logs, and a line for each.

    Attributes:
        study: Root of the study.
        name: The folder's, and that of its jobs.
    """

    study: Path
    name: str

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

    def output_of(self, job_id: str) -> Path:
        """What a job of it prints, as submitit calls it."""
        return self.logs / f"{job_id}_0_log.out"

    def log_at(self, path: str) -> Path:
        """A log by the path that it had when it was written: the study may have been moved since,
        with `logs/` in it."""
        there = Path(path)
        return there if there.exists() else self.logs / there.name

    def origin_file(self, job_id: str) -> Path:
        """What a job was submitted from, readable by its user alone."""
        return self.logs / f"{job_id}_origin.json"

    def submissions(self) -> list[dict[str, Any]]:
        """Every job that was submitted, oldest first: job_id, cluster, submitted."""
        try:
            lines = self.jobs_file.read_text(errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        entries = []
        for line in lines:
            try:
                entry = json.loads(line)
                if all(isinstance(entry[key], str) for key in SUBMISSION_KEYS):
                    entries.append(entry)
            except (ValueError, TypeError, KeyError):
                continue
        if damaged := len(lines) - len(entries):  # torn by a full disk
            warn_once(f"{self.jobs_file}: {damaged} lines are damaged and left out")
        # A job may be noted by itself, where a node may not ask for its mark, and its submitter.
        once = {(_job(e), e.get("mark") or number): e for number, e in enumerate(entries)}
        marked = {_job(entry) for entry in entries if entry.get("mark")}
        return [e for e in once.values() if e.get("mark") or _job(e) not in marked]

    def submission(self, job_id: str, slurm_cluster: str = "") -> dict[str, Any] | None:
        """The newest job that was submitted under this id; None if there was none.

        Args:
            job_id: The scheduler's id.
            slurm_cluster: Slurm's name of its cluster, if that is known: two clusters on one home
                use the same ids.
        """
        found = [entry for entry in self.submissions() if entry["job_id"] == job_id]
        if slurm_cluster:
            here = ("", slurm_cluster)
            found = [entry for entry in found if entry.get("slurm_cluster", "") in here]
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
        entry: dict[str, Any] = {"job_id": job_id, "cluster": cluster, "submitted": now()}
        entry |= {"log": str(log or ""), "host": socket.gethostname(), "uid": os.getuid()}
        entry |= identity or {}
        if continues:
            entry["continues"] = continues
        if again:
            entry["again"] = list(again)
        append_line(self.jobs_file, json.dumps(entry))


def _job(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["job_id"], entry.get("slurm_cluster", "")
