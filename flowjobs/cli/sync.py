"""flowjobs sync."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.prepare import RunNames, each_of
from flowjobs.errors import ConfigError, FlowjobsError, LoginError, ServerError
from flowjobs.runs.run import Run, default_study
from flowjobs.runs.status import JobInfo

if TYPE_CHECKING:
    from flowjobs.tracking.server import Server
    from flowjobs.tracking.sync import Synced


@dataclass(frozen=True)
class Sync:
    """Upload offline runs to W&B. Safe to repeat."""

    names: Annotated[RunNames, tyro.conf.arg(metavar="[RUN...]")] = ()
    """Names of runs; default: all of the study."""

    study: Path = field(default_factory=default_study)
    """Root of the study."""

    watch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on until Ctrl-C, and say only what is new."""

    as_new: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Upload the named runs as new ones, each under a new id: where they were deleted in W&B."""

    every_s: float = 60.0
    """With --watch: pause between two looks, in seconds."""

    def run(self, defaults: Defaults) -> int:
        """Upload. Returns the exit code."""
        if self.every_s <= 0:
            raise ConfigError(f"--every-s: found {self.every_s}, expected a number above 0")
        runs, broken = each_of(self.study, self.names)
        if self.as_new:
            self._start_anew(runs)
        server = _server()
        if not self.watch:
            return 1 if _sync(runs, server, said=None) or broken else 0
        said: set[str] = set()
        try:
            while True:
                _sync(runs, server, said)
                time.sleep(self.every_s)
                runs, _ = each_of(self.study, self.names)
        except KeyboardInterrupt:
            return 0

    def _start_anew(self, runs: Sequence[Run]) -> None:
        from flowjobs.jobs.lock_judge import judge_for
        from flowjobs.tracking.sync import upload_as_new

        if not self.names or self.watch:
            raise ConfigError("--as-new: name the runs that it is for, and leave --watch out")
        for run in runs:
            upload_as_new(run, judge_for(run, JobInfo.in_foreground()))


def _server() -> "Server":
    # Of another process; wandb would join it.
    os.environ.pop("WANDB_SERVICE", None)
    from wandb.sdk import wandb_setup

    from flowjobs.tracking.server import Server

    # From WANDB_BASE_URL, or from what `wandb login --host` wrote down. Not by wandb.setup(),
    # which starts wandb's own process.
    try:
        url = wandb_setup.singleton().settings.base_url
    except Exception as error:  # of any kind: wandb reads its variables and files there
        why = " ".join(str(error).split())
        raise ConfigError(f"wandb does not accept its settings (WANDB_BASE_URL?): {why}") from error
    return Server.of_this_login(url)


def _sync(runs: Sequence[Run], server: "Server", said: set[str] | None) -> bool:
    """Sync these runs, and print what there is to say.

    Args:
        runs: What to sync.
        server: Where to.
        said: The failures that were printed before, and need not be again; None prints all, also
            of runs where nothing was done.

    Returns:
        Whether something failed.
    """
    from flowjobs.tracking.refusal import current_refusal

    failures: set[str] = set()
    for run in runs:
        refusal = current_refusal(run)
        if refusal and said is not None:  # until somebody has done what it says
            failures.add(f"{run.name}: {refusal.text}")
            continue
        try:
            done = _sync_one(run, server)
        except LoginError:
            raise
        except ServerError as error:
            failures.add(str(error))
            break  # it would not do more for the other runs
        except (FlowjobsError, OSError) as error:
            failures.add(f"{run.name}: {error}")
            continue
        if said is None or done.state == "uploaded":
            print(_in_words(done), flush=True)
    for failure in sorted(failures - (said or set())):
        print(f"error: {failure}", file=sys.stderr, flush=True)
    if said is not None:
        said.clear()
        said |= failures
    return bool(failures)


def _sync_one(run: Run, server: "Server") -> "Synced":
    """Sync a run, with a bar in a terminal while rows are uploaded."""
    from rich.console import Console
    from rich.progress import Progress

    from flowjobs.jobs.lock_judge import judge_for
    from flowjobs.tracking.sync import sync_run

    # Where a file system has no locks, Slurm says whether the run still trains.
    judge = judge_for(run, JobInfo.in_foreground())
    console = Console(stderr=True)
    if not console.is_terminal:
        return sync_run(run, server, lambda rows, total: None, judge=judge)
    bars = Progress(console=console, transient=True)
    bar = bars.add_task(run.name)

    def show(rows: int, total: int) -> None:
        bars.start()
        bars.update(bar, completed=rows, total=total)

    try:
        return sync_run(run, server, show, judge=judge)
    finally:
        bars.stop()


def _in_words(done: "Synced") -> str:
    match done.state:
        case "uploaded":
            return f"{done.run}: {done.rows} rows uploaded, verified"
        case "unchanged":
            return f"{done.run}: all of it is on the server"
        case "trains":
            return f"{done.run}: trains now ({done.note}); sync it when it has stopped"
    return f"{done.run}: not tracked"
