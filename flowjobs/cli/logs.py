"""flowjobs logs."""

import codecs
import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import tyro

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.follow import FINAL_STATES, LAST_WORDS_S, POLL_S
from flowjobs.cli.parser import Flag
from flowjobs.cli.runs_named import RunNames, existing_run, readable_runs
from flowjobs.config import OptionalInt
from flowjobs.errors import ConfigError, RunNotFoundError
from flowjobs.formatting import counted
from flowjobs.runs.run import Run, absolute

BLOCK_BYTES = 1 << 20
FROM_PYTHON = "has no log: it was trained from Python, which shows its output itself"


@dataclass(frozen=True)
class Logs(InStudy):
    """Print the output of a run's newest job."""

    names: Annotated[RunNames, tyro.conf.arg(metavar="[RUN...]")] = ()
    """Name of the run, or anything that means one run alone; with --failed, where to look."""

    failed: Flag = False
    """The run that failed last, of those that are named, or of all."""

    attempt: OptionalInt = None
    """Number of the attempt; default: the newest job's log, which several attempts may share."""

    rank: OptionalInt = None
    """Rank of the process whose output is printed, where each has its own log; default: 0."""

    follow: Annotated[Flag, tyro.conf.arg(aliases=["-f"])] = False
    """Keep printing until the run has ended (a preempted run has not) or Ctrl-C."""

    def run(self, defaults: Defaults) -> int:
        """Print. Returns the exit code."""
        run = self._run()
        if self.attempt is not None or self.rank is not None:
            return self._print_one(run)
        shown = _newest_log(run)
        if shown is None:
            why = _why_no_log(run)
            if why or not self.follow:
                raise RunNotFoundError(why or f"{run.name} has no log yet: its job has not started")
            print(f"{run.name} has no log yet: waiting for its job to start", file=sys.stderr)
        # All of them: the last lines of an attempt may come when the next has begun.
        followed: dict[Path, _Growing] = {}
        ended_at: float | None = None
        while True:
            # Looked up before the log is read: then nothing comes after what is read last.
            now, newest = time.monotonic(), _newest_log(run)
            ended_at = None if not _has_ended(run) else ended_at or now
            for path in filter(None, (shown, newest)):
                followed.setdefault(path, _Growing(path))
            for log in followed.values():
                with contextlib.suppress(FileNotFoundError):  # an old one that was removed
                    log.print_more()
            shown = newest
            if not self.follow or (ended_at is not None and now - ended_at > LAST_WORDS_S):
                return 0
            time.sleep(POLL_S)

    def _run(self) -> Run:
        if self.failed:
            return last_failed(self.study, self.names)
        if len(self.names) != 1:
            raise ConfigError(f"logs: found {len(self.names)} names, expected one, or --failed")
        return existing_run(self.study, self.names[0])

    def _print_one(self, run: Run) -> int:
        """Print the log of an attempt, or of a rank of it."""
        if self.follow:
            raise ConfigError("-f: found --attempt or --rank, expected neither")
        log = _newest_log(run)
        if self.attempt is not None:
            attempts = run.status().attempts
            if not 1 <= self.attempt <= len(attempts):
                raise ConfigError(
                    f"--attempt: found {self.attempt}, and {run.name} has {len(attempts)}"
                )
            path = attempts[self.attempt - 1].job.log
            if not path:
                raise RunNotFoundError(f"attempt {self.attempt} of {run.name} {FROM_PYTHON}")
            log = run.log_at(path)
        if log is not None and self.rank:
            # As submitit names them: JOB_RANK_log.out.
            log = log.with_name(re.sub(r"_0_log\.out$", f"_{self.rank}_log.out", log.name))
            if f"_{self.rank}_log.out" not in log.name:
                raise ConfigError(f"--rank: all ranks of {run.name} write to {log}")
        if log is None or not log.is_file():
            why = f"{run.name} has no such log: {log or 'no job has started'}"
            raise RunNotFoundError(_why_no_log(run) or why)
        _Growing(log).print_more()
        return 0


def last_failed(study: Path, names: Sequence[str]) -> Run:
    """The run that failed last, of those selected.

    Raises:
        RunNotFoundError: None did.
    """
    from flowjobs.jobs.dead_jobs import DeadJob, final_outcome, find_dead_jobs
    from flowjobs.slurm.jobs import Unknown

    runs, broken = readable_runs(study, names)
    # The record alone does not know it: a process may have been killed unnoticed.
    findings = find_dead_jobs(runs, at_most_twice=True)
    ended = {}
    for run in runs:
        status, finding = run.status(), findings.get(run)
        if isinstance(finding, DeadJob):
            status.record_outcome_of_dead(final_outcome(run, status, finding), run.metrics_file)
        if status.state == "failed":
            newest = status.attempts[-1].ended if status.attempts else None
            ended[run] = newest or status.updated
    if not ended:
        unknown = len(broken) + sum(isinstance(found, Unknown) for found in findings.values())
        of_others = f"; of {counted(unknown)} it is unknown" if unknown else ""
        raise RunNotFoundError(
            f"no run of {len(runs) + len(broken)} in {absolute(study)} has failed{of_others}"
        )
    run = max(ended, key=lambda run: ended[run])
    print(f"{run.name} failed at {ended[run]}", file=sys.stderr)
    return run


class _Growing:
    """A log, and how much of it has been printed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        # A look may come when a character is half written.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def print_more(self) -> None:
        """Print what has been added, a block at a time: a log may be larger than the memory."""
        with self._path.open("rb") as file:
            # One that was cut short, as a full disk makes people do, is begun anew.
            if self._offset > os.fstat(file.fileno()).st_size:
                self._offset = 0
                self._decoder.reset()
            file.seek(self._offset)
            while block := file.read(BLOCK_BYTES):
                sys.stdout.write(self._decoder.decode(block))
            sys.stdout.flush()
            self._offset = file.tell()


def _has_ended(run: Run) -> bool:
    """Whether nothing more is to come: the run is at an end and no new job of it waits."""
    status = run.status()
    if run.cancel_requested():  # nothing starts it again, and a job that waited is gone
        return status.open_attempt is None
    if status.state not in FINAL_STATES or not status.attempts:
        return False
    last = status.attempts[-1]
    newest = run.newest_job()
    return not newest or newest.job_id == last.job.job_id or newest.submitted < last.started


def _why_no_log(run: Run) -> str:
    """Why a run that has begun has no log; "" if a job of it has one, or will."""
    attempts = run.status().attempts
    if not attempts or attempts[-1].job.log:
        return ""
    if any(job.submitted >= attempts[-1].started for job in run.submissions()):
        return ""
    return f"{run.name} {FROM_PYTHON}"


def _newest_log(run: Run) -> Path | None:
    """The log of the newest attempt, or of a job that was submitted since it began.

    By the record's times: those of the files are another order in a copy.
    """
    logs = [(attempt.started, attempt.job.log or "") for attempt in run.status().attempts]
    logs += [(entry.submitted, entry.log) for entry in run.submissions()]
    logs.sort(key=itemgetter(0))
    existing = [log for _, path in logs if path and (log := run.log_at(path)).exists()]
    return existing[-1] if existing else None
