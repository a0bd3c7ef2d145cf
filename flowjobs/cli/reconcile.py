"""flowjobs reconcile."""

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import tyro

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.runs_named import RunNames, readable_runs
from flowjobs.config import OptionalInt
from flowjobs.errors import ConfigError
from flowjobs.runs.pack import FOLDER as PACKS
from flowjobs.runs.pack import Pack
from flowjobs.runs.run import Run, absolute
from flowjobs.runs.status import EXIT_BAD_INPUT
from flowjobs.slots import submitted_for_run


@dataclass(frozen=True)
class Reconcile(InStudy):
    """Record how silently dead jobs ended, and restart the runs that may be retried."""

    names: Annotated[RunNames, tyro.conf.arg(metavar="[RUN...]")] = ()
    """Names, patterns, a sweep, a group, or FIELD=VALUE; default: all."""

    exit_code: OptionalInt = None
    """What srun returned: given by the last lines of the run's own batch script."""

    def run(self, defaults: Defaults) -> int:
        """Record and restart what is dead. Returns the exit code."""
        from flowjobs.jobs.reconcile import reconcile

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        if self.exit_code is None:
            runs, broken = readable_runs(self.study, self.names)
            if not (runs or broken):  # mistyped, say, or not mounted yet
                print(f"there are no runs in {absolute(self.study)}", file=sys.stderr)
            unclear = bool(broken)
            for found in reconcile(runs):
                if found.outcome:
                    print(f"{found.run.name}: {found.outcome.state}: {found.outcome.reason}")
                else:
                    unclear = True
                    print(f"{found.run.name}: unknown: {found.unclear}", file=sys.stderr)
            return EXIT_BAD_INPUT if unclear else 0
        if not (submitted_for_run() and self.names):
            raise ConfigError(
                "--exit-code: expected only in the batch script of a run's own job, with its name"
            )
        # A task of an array says what it is: runs/NAME, or packs/NAME.
        kind, _, name = self.names[0].rpartition("/")
        if kind == PACKS:
            print_pack_end(Pack(absolute(self.study), name), self.exit_code)
        else:
            print_job_end(readable_runs(self.study, [name])[0], self.exit_code)
        return 0


def print_pack_end(pack: Pack, exit_code: int) -> None:
    """The same for the runs of a job that they share; see `print_job_end`."""
    from flowjobs.jobs.environment import batch_script_job
    from flowjobs.jobs.reconcile import handle_pack_end

    ended = handle_pack_end(pack, batch_script_job(pack), exit_code)
    for run, outcome in ended.items():
        print(f"{run.name}: {outcome.state}: {outcome.reason}")


def print_job_end(runs: Iterable[Run], exit_code: int) -> None:
    """Handle the end of the job whose batch script this process is in; print how its runs ended.

    Args:
        runs: The job's.
        exit_code: What its srun returned, not 0.
    """
    from flowjobs.jobs.environment import batch_script_job
    from flowjobs.jobs.reconcile import handle_job_end

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for run in runs:
        if outcome := handle_job_end(run, batch_script_job(run), exit_code):
            print(f"{run.name}: {outcome.state}: {outcome.reason}")
