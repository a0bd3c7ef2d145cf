"""flowjobs logs."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.prepare import existing_run
from flowjobs.errors import RunNotFoundError
from flowjobs.runs.run import Run, default_study

POLL_S = 0.3


@dataclass(frozen=True)
class Logs:
    """Print the output of a run's newest job."""

    name: tyro.conf.Positional[str]
    """Name of the run."""

    follow: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=["-f"])] = False
    """Go on printing what is added, until Ctrl-C."""

    study: Path = field(default_factory=default_study)
    """Root of the study."""

    def run(self, defaults: Defaults) -> int:
        """Print. Returns the exit code."""
        run = existing_run(self.study, self.name)
        shown, offset = _newest_log(run), 0
        if shown is None and not self.follow:
            raise RunNotFoundError(f"{run.name} has no log yet: its job has not started")
        while True:
            if shown is not None and shown.exists():
                with shown.open("rb") as file:
                    file.seek(offset)
                    sys.stdout.write(file.read().decode(errors="replace"))
                    sys.stdout.flush()
                    offset = file.tell()
            if not self.follow:
                return 0
            time.sleep(POLL_S)
            if (newest := _newest_log(run)) != shown:
                shown, offset = newest, 0


def _newest_log(run: Run) -> Path | None:
    """The log of the newest attempt, or of the newest job before its first attempt."""
    status = run.status()
    names = [entry["log"] for entry in run.submissions()]
    if status and status.log:
        names.append(status.log)
    existing = [Path(name) for name in names if name and Path(name).exists()]
    return max(existing, key=lambda path: path.stat().st_mtime, default=None)
