"""flowjobs sync."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TextIO

import tyro

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.numbers import check_seconds
from flowjobs.cli.output import NewLines
from flowjobs.cli.parser import Flag
from flowjobs.cli.runs_named import RunNames, readable_runs
from flowjobs.errors import ConfigError, FlowjobsError, LoginError, ServerError
from flowjobs.runs.run import Run, absolute
from flowjobs.runs.status import JobInfo

if TYPE_CHECKING:
    from flowjobs.tracking.sync import Synced

# An upload that takes longer is spoken of where no terminal shows it.
SAY_AFTER_S = 5.0


@dataclass(frozen=True)
class Sync(InStudy):
    """Upload offline runs to W&B. Safe to repeat."""

    names: Annotated[RunNames, tyro.conf.arg(metavar="[RUN...]")] = ()
    """Names, patterns, a sweep, a group, or FIELD=VALUE; default: all of the study."""

    watch: Flag = False
    """Sync again every --every-s seconds until Ctrl-C; print only what changed."""

    as_new: Flag = False
    """Upload those of the named runs that were deleted in W&B as new ones, under a new id."""

    every_s: float = 60.0
    """With --watch: pause between two looks, in seconds."""

    def run(self, defaults: Defaults) -> int:
        """Upload. Returns the exit code."""
        check_seconds("--every-s", self.every_s)
        if self.as_new and (self.watch or not self.names):
            raise ConfigError("--as-new: name the runs that it is for, and leave --watch out")
        errors = NewLines(sys.stderr, set())
        if not self.watch:
            return 1 if self._look(errors) else 0
        with contextlib.suppress(KeyboardInterrupt):
            self._look(errors)
            while True:
                time.sleep(self.every_s)
                errors = NewLines(sys.stderr, errors.lines)
                try:
                    self._look(errors)
                except (FlowjobsError, OSError) as error:  # a server may be back at the next look
                    print(f"error: {error}", file=errors)
        return 0

    def _look(self, errors: TextIO) -> bool:
        """Sync the runs as they are now, saying on `errors` what fails. Returns whether any did."""
        with contextlib.redirect_stderr(errors):
            runs, broken = readable_runs(self.study, self.names)
        if not (runs or broken):
            print(f"there are no runs in {absolute(self.study)}", file=errors)
        return bool(runs and self._sync(runs, errors)) or bool(broken)

    def _sync(self, runs: Sequence[Run], errors: TextIO) -> bool:
        """Sync these runs, and print what there is to say. Returns whether something failed."""
        from flowjobs.tracking.mode import server_of, server_url
        from flowjobs.tracking.record import read_uploaded, tracking_of

        places = {run: tracking_of(run) for run in runs}
        servers = {
            run: server_of(place) for run, place in places.items() if place.wandb_mode != "disabled"
        }
        # These would not do more for their other runs.
        refused: dict[str, FlowjobsError] = _without_login({*servers.values()} or {server_url()})
        failures = {str(error) for error in refused.values()}
        try:
            for run in runs:
                if servers.get(run) in refused:
                    continue
                refusal = read_uploaded(run).refusal
                if refusal and self.watch:  # until somebody has done what it says
                    failures.add(f"{run.name}: {refusal.text}")
                    continue
                try:
                    done = self._sync_one(run)
                except (LoginError, ServerError) as error:
                    refused[servers[run]] = error
                    # Where no other server is left, that ends the command.
                    if isinstance(error, LoginError) and refused.keys() >= {*servers.values()}:
                        raise
                    failures.add(str(error))
                    continue
                except (FlowjobsError, OSError) as error:
                    failures.add(f"{run.name}: {error}")
                    continue
                if done.state == "uploaded" or not self.watch:
                    print(f"{run.name}: {_in_words(done)}", flush=True)
        finally:  # also before what ends the command
            for failure in sorted(failures):
                print(f"error: {failure}", file=errors)
        return bool(failures)

    def _sync_one(self, run: Run) -> "Synced":
        """Sync a run, and say that it takes a while."""
        from flowjobs.jobs.lock_judge import judge_for
        from flowjobs.tracking.sync import sync_run

        # Where a file system has no locks, Slurm says whether the run still trains.
        judge = judge_for(run, JobInfo.in_foreground())
        with _while_it_lasts(f"uploading {run.name}"):
            # For a whole study, or at each look of a watch, that would be too many requests.
            ask = bool(self.names) and not self.watch
            return sync_run(run, judge, ask=ask, as_new=self.as_new)


@contextlib.contextmanager
def _while_it_lasts(words: str) -> Iterator[None]:
    """Show words in a terminal as long as the block lasts; elsewhere print them if it is long."""
    from flowjobs.cli.live_line import StatusLine  # slow to load

    ended = threading.Event()
    with StatusLine(words) as line:

        def say() -> None:
            while not ended.wait(SAY_AFTER_S):
                line.say(words, words)

        speaker = threading.Thread(target=say, daemon=True)
        speaker.start()
        try:
            yield
        finally:
            ended.set()
            speaker.join()


def _without_login(servers: set[str]) -> dict[str, FlowjobsError]:
    """Those of the servers that there is no login for here, and what to do about it.

    Raises:
        ConfigError: One is no address.
        LoginError: There is none for any.
    """
    from flowjobs.tracking.mode import check_login

    found: dict[str, FlowjobsError] = {}
    for server in sorted(servers):
        try:
            check_login(server)
        except LoginError as error:
            found[server] = error
            if found.keys() == servers:
                raise
    return found


def _in_words(done: "Synced") -> str:
    match done.state:
        case "uploaded":
            return f"{done.rows} rows uploaded, verified"
        case "complete":
            return "all of it is on the server"
        case "unchanged":
            return "unchanged since the last check, when the server had all"
        case "running":
            return f"trains now ({done.note}); sync it when it has stopped"
    return f"not tracked: {done.note}"
