"""flowjobs rm."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from flowjobs.cli.confirm import confirmed
from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.parser import Flag
from flowjobs.cli.runs_named import RunNames, check_named, list_of, runs_matching
from flowjobs.config import RunConfig
from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.formatting import counted, first_of, format_bytes
from flowjobs.runs.hint import hint
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_BAD_INPUT, read_sound_status


@dataclass(frozen=True, kw_only=True)
class Rm(InStudy):
    """Remove runs with their weights, records and logs; asks first. W&B keeps what it has."""

    names: RunNames
    """Names, patterns, a sweep, a group, or FIELD=VALUE (flow=otcfm state=failed)."""

    yes: Flag = False
    """Do not ask."""

    def run(self, defaults: Defaults) -> int:
        """Remove them. Returns the exit code."""
        from flowjobs.runs.removal import remove, size_of

        check_named("rm", self.names)
        runs, broken = runs_matching(self.study, self.names)
        runs, unknown = self._without_jobs(runs)
        broken += unknown
        if not runs:
            return EXIT_BAD_INPUT
        size = format_bytes(sum(size_of(run) for run in runs))
        print(f"removes {list_of(runs)}; {size}", flush=True)
        if not self.yes:
            question = f"remove {counted(len(runs))} for good?"
            if not confirmed(question, "rm asks first, and stdin is not a terminal: add --yes"):
                return 0
            # Another terminal may have submitted one of them while the question stood.
            runs, unknown = self._without_jobs(runs)
            broken += unknown
        for run in runs:
            try:
                remove(run)
            except (FlowjobsError, OSError) as error:
                print(f"error: {run.name}: {error}", file=sys.stderr)
                broken.append(run)
        return EXIT_BAD_INPUT if broken else 0

    def _without_jobs(self, runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
        """Those of which no job waits or runs, and those of which that is unknown, which it says.

        Raises:
            ConfigError: A job of one of them does.
        """
        from flowjobs.jobs.current_job import RunningJob, running_jobs
        from flowjobs.jobs.run_stages import stages

        configs: dict[Run, RunConfig] = {}
        for run in runs:
            with contextlib.suppress(ConfigError):
                read_sound_status(run.status_file)
                configs[run] = run.config()
        members = stages(configs)
        # Whether a job of one with damaged files lives is told by Slurm and the lock alone.
        busy = running_jobs([run for run in runs if run not in configs])
        alive = [run for run in configs if members[run].stage in ("waiting", "running")]
        alive += [run for run, job in busy.items() if isinstance(job, RunningJob)]
        if alive:
            one = len(alive) == 1
            waits = "waits or runs: cancel it" if one else "wait or run: cancel them"
            raise ConfigError(
                f"{first_of([run.name for run in alive])} {waits} first "
                f"({hint('cancel', *self.names, study=self.study)}); nothing was removed"
            )
        unknown = {run: members[run].jobs_unknown for run in configs if members[run].jobs_unknown}
        unknown |= {run: members[run].why for run in configs if members[run].stage == "unknown"}
        unknown |= {run: str(why) for run, why in busy.items()}
        for run, why in unknown.items():
            print(f"error: {run.name} is left: {why}", file=sys.stderr)
        return [run for run in runs if run not in unknown], [*unknown]
