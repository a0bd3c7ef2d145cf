"""Several runs that share one job: which they are, and which of them it has still to train.

    STUDY/packs/NAME/
        pack.json      its runs, in their order; how many train at once; what the job asks for
        jobs.jsonl     a line a submission
        starts.jsonl   a line each time that a job of it has started
        logs/          batch files and output of its jobs; a run's own output is with the run

Each run notes the job as its own, with the pack's name. From then on it is the run's record that
says whether the job has still to train it: nothing is kept twice.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flowjobs.config import SlurmConfig
from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.from_json import from_json
from flowjobs.runs.files import append_line, read_json, warn_once, write_json
from flowjobs.runs.run import Run
from flowjobs.runs.status import now
from flowjobs.runs.submittable import Submittable, attempts_of

FOLDER = "packs"


@dataclass(frozen=True)
class Pack(Submittable):
    """One pack of a study. What it holds is on disk."""

    @property
    def folder(self) -> Path:
        """`STUDY/packs/NAME`."""
        return self.study / FOLDER / self.name

    @property
    def starts_file(self) -> Path:
        """A line each time that a job of it has started."""
        return self.folder / "starts.jsonl"

    @cached_property
    def _content(self) -> dict[str, Any]:
        file = self.folder / "pack.json"
        try:
            return read_json(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read ({error}): submit its runs again") from error

    @property
    def runs(self) -> list[Run]:
        """All runs that were ever in it."""
        return [Run(self.study, name) for name in self._content["runs"]]

    @property
    def slots(self) -> int:
        """How many of them train at once."""
        return int(self._content["slots"])

    def asked(self) -> SlurmConfig:
        """See `Submittable`."""
        return from_json(SlurmConfig, self._content["slurm"])

    def cancel_requested(self) -> bool:
        """Whether nothing of it is left to train, as the user has cancelled the last of it."""
        jobs = self.submissions()
        cancelled = any(run.cancel_requested() for run in self.runs)
        return cancelled and bool(jobs) and not self.remaining(jobs[-1].job_id)

    def starts_of(self, job_id: str) -> int:
        """See `Submittable`."""
        try:
            lines = self.starts_file.read_text().splitlines()
        except FileNotFoundError:
            return 0
        return sum(f'"job_id": "{job_id}"' in line for line in lines)

    def note_start(self, job_id: str) -> None:
        """Note that a job of it has started."""
        append_line(self.starts_file, json.dumps({"job_id": job_id, "time": now()}))

    def remaining(self, job_id: str) -> list[Run]:
        """The runs that a job of it has still to train, or may have, in their order."""
        return [run for run in self.runs if may_remain(run, job_id)]

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
        """Note a job, here and in the runs that it is to train; see `Submittable`.

        Those are all; of a job that continues another one, what that one has left.
        """
        runs = [run for run in self.runs if continues is None or is_remaining(run, continues)]
        shared = {**(identity or {}), "pack": self.name, "job_log": str(log or "")}
        for run in runs:
            if run.removed():
                continue  # the others are trained
            own = run.output_of(job_id)
            run.add_submission(job_id, cluster, own, continues=continues, identity=shared)
        # Last: where it is missing, the job itself notes all of it again.
        super().add_submission(
            job_id, cluster, log, continues=continues, again=again, identity=identity
        )


def new_pack(study: Path, name: str, runs: Sequence[Run], slots: int, asked: SlurmConfig) -> Pack:
    """Make a pack of runs that exist.

    Args:
        study: Root of the study.
        name: What its jobs are called; the pack's own name is that and a few digits.
        runs: Those that are to be trained.
        slots: How many train at once.
        asked: What a job asks of the cluster, for all of them together.

    Raises:
        ConfigError: They cannot share a job.
    """
    check_shared(slots, asked)
    pack = Pack(study, f"{name}-{secrets.token_hex(3)}")
    pack.logs.mkdir(parents=True)
    content = {"runs": [run.name for run in runs], "slots": slots, "slurm": asdict(asked)}
    write_json(pack.folder / "pack.json", content)
    return pack


def check_shared(slots: int, asked: SlurmConfig) -> None:
    """Raise a ConfigError unless so many runs can share a job that asks for this."""
    if slots < 1:
        raise ConfigError(f"--runs-per-gpu: found {slots}, expected at least 1")
    if slots > 1 and (asked.nodes > 1 or asked.gpus_per_node > 1):
        raise ConfigError(
            f"--runs-per-gpu {slots}: found --nodes {asked.nodes} --gpus-per-node "
            f"{asked.gpus_per_node}, expected jobs of one GPU, which {slots} runs share"
        )


def submittable_at(study: Path, folder: Path) -> Submittable:
    """The run or the pack whose folder this is, `runs/NAME` or `packs/NAME` below the study's."""
    return Pack(study, folder.name) if folder.parent.name == FOLDER else Run(study, folder.name)


def pack_of(run: Run, job_id: str) -> Pack | None:
    """The pack whose job this is; None if it is the run's own."""
    entry = run.submission(job_id)
    return Pack(run.study, entry.pack) if entry and entry.pack else None


def is_remaining(run: Run, job_id: str) -> bool:
    """Whether a job that the run shares has still to train it, now or when there is a slot.

    Not once it has ended in that job, is cancelled, or has been submitted as another job.
    """
    newest = run.newest_job()
    if newest is None or newest.job_id != job_id or run.cancel_requested():
        return False
    if _at_its_end(run):
        return False
    status = run.status()
    if not attempts_of(newest, status.attempts[-1:]):
        return True
    return status.state not in ("failed", "cancelled")


def may_remain(run: Run, job_id: str) -> bool:
    """The same, or whether that is unknown now: a file server may be away for a moment."""
    try:
        return is_remaining(run, job_id)
    except OSError as error:
        warn_once(f"whether {run.name} is still to be trained is unknown: {error}")
        return True


def _at_its_end(run: Run) -> bool:
    try:
        return run.finished()
    except FlowjobsError:
        return False  # its own process says what is wrong with it
