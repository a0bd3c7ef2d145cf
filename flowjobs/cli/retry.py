"""flowjobs retry."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flowjobs.cli.code_options import CodeOptions
from flowjobs.cli.defaults import CommandOptions, Defaults
from flowjobs.cli.numbers import check_counts
from flowjobs.cli.output import print_rows
from flowjobs.cli.parser import Flag
from flowjobs.cli.runs_named import RunNames, check_named, readable_runs
from flowjobs.cli.start_many import (
    check_parallel,
    cluster_flag,
    only_submitter,
    plan_code_of,
    print_notes,
    print_parallel,
    print_resources,
    submit_many,
    that_can_be_started,
    train_many_here,
)
from flowjobs.config import OptionalInt
from flowjobs.errors import ConfigError
from flowjobs.formatting import counts_of, first_of
from flowjobs.runs.hint import hint
from flowjobs.runs.pack import check_shared
from flowjobs.runs.run import absolute
from flowjobs.runs.selection import sweep_names
from flowjobs.runs.status import EXIT_BAD_INPUT

if TYPE_CHECKING:
    from flowjobs.jobs.run_stages import Member


@dataclass(frozen=True, kw_only=True)
class Retry(CodeOptions, CommandOptions):
    """Start failed and cancelled runs again, from their newest checkpoint, as one Slurm array.

    All others are left alone. What failed for memory or time is started with more of it alone, and
    what diverged with other code.
    """

    names: RunNames
    """Names, patterns, a sweep, a group, or FIELD=VALUE (flow=otcfm state=failed)."""

    changes: Annotated[tuple[str, ...], tyro.conf.arg(name="with", metavar="KEY=VALUE")] = ()
    """Other options of the cluster for these runs: mem_gb=64 timeout_min=240 partition=long; or
    runs_per_gpu=2, how many of them share a job; default: each has its own."""

    parallel: OptionalInt = None
    """Runs at a time; default: as many as the cluster takes, or one for each GPU here."""

    dry_run: Flag = False
    """Print what would be started; start nothing."""

    def run(self, defaults: Defaults) -> int:
        """Start them. Returns the exit code."""
        from flowjobs.jobs.executors import check_meant_for_here, choose_cluster
        from flowjobs.jobs.run_stages import stages
        from flowjobs.sweeps.retry import RUNS_PER_GPU, changes_from

        check_named("retry", self.names)
        check_counts(parallel=self.parallel)
        if "--with" in defaults.flags and not self.changes:
            raise ConfigError("--with: found no value, expected KEY=VALUE (mem_gb=64)")
        changes = changes_from(self.changes)
        slots: int = changes.get(RUNS_PER_GPU, 1)
        cluster, why = choose_cluster(self.cluster)
        if cluster == "debug":
            raise ConfigError("--cluster debug: found several runs; submit one of them")
        if cluster == "slurm":
            check_parallel(self.parallel, slots)
        runs, broken = readable_runs(self.study, self.names)
        study, *others = sorted({run.study for run in runs} or {absolute(self.study)})
        if others:  # runs that share an array, or a job, are known by name
            found_in = " and ".join(map(str, [study, *others]))
            raise ConfigError(
                f"retry: found runs of {found_in}, expected those of one study at a time"
            )
        with only_submitter(study, cluster == "slurm" and not self.dry_run):
            found = stages({run: run.config() for run in runs})
            members = [found[run] for run in runs]
            print_rows(cluster=f"{cluster} ({why})")
            asked = self._print_plan(members, changes, slots)
            starting = that_can_be_started(asked)
            to_start = [member.run for member in starting]
            check_meant_for_here((cluster, why), defaults.flags, to_start)
            if not starting:
                print("nothing to start")
            else:
                print_resources(starting, self.parallel, slots)
                if self.parallel and cluster == "slurm":
                    print_parallel([], starting, self.parallel, slots)
            # The exit code if nothing else goes wrong.
            code_at_best = EXIT_BAD_INPUT if broken or len(starting) < len(asked) else 0
            code = plan_code_of(starting, self.code_choice())
            print_notes(plan.note for plan in code)
            if self.dry_run or not starting:
                return code_at_best
            again = hint("retry", *self.names, *self.flags_again(defaults), study=study)
            if cluster == "slurm":
                name = self._name(study)
                submit_many(starting, code, name, self.parallel, slots, again, self.names)
                return code_at_best
        return train_many_here(starting, code, self.parallel, slots, again) or code_at_best

    def _print_plan(
        self, members: Sequence["Member"], changes: dict[str, Any], slots: int
    ) -> "list[Member]":
        """Print what there is by its cause. Returns the runs to start."""
        from flowjobs.sweeps.retry import NEW_CODE, causes, with_changes

        found = causes(members)
        others = Counter(member.stage for member in members) - Counter(
            member.stage for cause in found for member in cause.members
        )
        if others:
            print_rows(unchanged=counts_of(others))
        for member in members:
            if member.jobs_unknown:
                print_rows(cancelled=f"{member.run.name}: {member.jobs_unknown}")
        starting: list[Member] = []
        for member in (member for cause in found for member in cause.members):
            check_shared(slots, with_changes(member.config, changes).slurm)
        for cause in found:
            names = first_of([member.run.name for member in cause.members])
            helps = {*changes, *([NEW_CODE] if self.new_code else [])}
            held = bool(cause.needs) and not helps & {*cause.needs}
            advice = "" if cause.needs or not cause.advice else f"; {cause.advice}"
            if held:
                advice = f"; not started, it would fail again: {cause.advice}"
            title = "held" if held else "restarts"
            print(f"{title:10} {len(cause.members)} ({cause.kind}): {names}{advice}")
            if not held:
                starting += [
                    replace(member, config=with_changes(member.config, changes))
                    for member in cause.members
                ]
        return starting

    def flags_again(self, defaults: Defaults) -> list[str]:
        """What the command that starts the others has to say beside the names."""
        changes = ["--with", *self.changes] if self.changes else []
        parallel = ["--parallel", str(self.parallel)] if self.parallel else []
        return [*changes, *parallel, *self.flags(), *cluster_flag(self, defaults)]

    def _name(self, study: Path) -> str:
        """The array's name in the queue."""
        sweeps = [name for name in self.names if name in sweep_names(study)]
        return sweeps[0] if sweeps else "retry"
