"""flowjobs logs."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.follow import FINAL_STATES, LAST_WORDS_S, POLL_S
from flowjobs.cli.prepare import RunName, existing_run
from flowjobs.errors import RunNotFoundError
from flowjobs.runs.run import Run, default_study


@dataclass(frozen=True)
class Logs:
    """Print the output of a run's newest job."""

    name: RunName
    """Name of the run, or anything that means one run alone."""

    follow: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=["-f"])] = False
    """Go on printing what is added, until the run has ended (a preempted one has not), or
    Ctrl-C."""

    study: Path = field(default_factory=default_study)
    """Root of the study."""

    def run(self, defaults: Defaults) -> int:
        """Print. Returns the exit code."""
        run = existing_run(self.study, self.name)
        shown = _newest_log(run)
        if shown is None and not self.follow:
            raise RunNotFoundError(f"{run.name} has no log yet: its job has not started")
        if shown is None:
            print(f"{run.name} has no log yet: waiting for its job to start", file=sys.stderr)
        # Kept for each: the last lines of an attempt may come when the next has begun.
        offsets: dict[Path, int] = {}
        ended_at: float | None = None
        while True:
            # Looked up before the log is read: then nothing comes after what is read last.
            now, newest = time.monotonic(), _newest_log(run)
            ended_at = None if not _has_ended(run) else ended_at or now
            for log in dict.fromkeys((shown, newest)):
                if log is not None:
                    offsets[log] = _print_from(log, offsets.get(log, 0))
            shown = newest
            if not self.follow or (ended_at is not None and now - ended_at > LAST_WORDS_S):
                return 0
            time.sleep(POLL_S)


def _print_from(log: Path, offset: int) -> int:
    """Print what the file has from `offset` on. Returns its end."""
    with log.open("rb") as file:
        file.seek(offset)
        sys.stdout.write(file.read().decode(errors="replace"))
        sys.stdout.flush()
        return file.tell()


def _has_ended(run: Run) -> bool:
    """Whether nothing more is to come: the run is at an end and no new job of it waits."""
    status = run.status()
    if status is None or status.state not in FINAL_STATES:
        return False
    last = status.attempts[-1]
    jobs = run.submissions()
    return not jobs or jobs[-1]["job_id"] == last.job.job_id or jobs[-1]["submitted"] < last.started


def _newest_log(run: Run) -> Path | None:
    """The log of the newest attempt, or of the newest job before its first attempt."""
    status = run.status()
    names = [entry["log"] for entry in run.submissions()]
    if status and status.log:
        names.append(status.log)
    existing = [Path(name) for name in names if name and Path(name).exists()]
    return max(existing, key=lambda path: path.stat().st_mtime, default=None)
