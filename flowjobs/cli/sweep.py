"""flowjobs sweep."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import tyro

from flowjobs.cli.code_options import CodeOptions
from flowjobs.cli.confirm import confirmed
from flowjobs.cli.defaults import CommandOptions, Defaults, WithDefaults
from flowjobs.cli.numbers import check_counts
from flowjobs.cli.output import disk_words, print_rows
from flowjobs.cli.parser import Flag
from flowjobs.cli.prepare import from_root
from flowjobs.cli.prepare_sweep import prepare_sweep
from flowjobs.cli.start_many import (
    check_parallel,
    check_ranks_of,
    cluster_flag,
    only_submitter,
    plan_code_of,
    print_notes,
    print_parallel,
    print_resources,
    share,
    submit_many,
    that_can_be_started,
    train_many_here,
)
from flowjobs.config import (
    FILE_FIELDS,
    OptionalInt,
    OptionalStr,
    RestartConfig,
    RunConfig,
    SlurmConfig,
    TrackingConfig,
    TrainingConfig,
)
from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.field_values import KeyValues, flag, key_value
from flowjobs.formatting import counted, first_of
from flowjobs.models.size import size_words
from flowjobs.runs.hint import hint
from flowjobs.runs.run import Run, absolute, check_is_file
from flowjobs.runs.selection import ARGUMENT
from flowjobs.runs.status import EXIT_BAD_INPUT
from flowjobs.sweeps import grid
from flowjobs.sweeps.saved import (
    check_same,
    check_sweep_name,
    left_out,
    read_saved,
    save_sweep,
)
from flowjobs.sweeps.toml_file import read_sweep

if TYPE_CHECKING:
    from flowjobs.jobs.run_stages import Member
    from flowjobs.jobs.snapshot import CodePlan

EXAMPLES = """\
  flowjobs sweep --arch mlp my_models:Wide --flow icfm otcfm --seed 0 1 2
  flowjobs sweep --lr 1e-3 3e-4 --batch-size 64 256 --zip lr batch_size --name rates
  flowjobs sweep ablation.toml --parallel 16 --partition preempt
  flowjobs sweep ablation
"""

ASKS_ABOVE = 100


def _values_of_fields() -> Any:
    """TrainingConfig, with several values of each field."""
    hints = get_type_hints(TrainingConfig)
    values = []
    for known in dataclasses.fields(TrainingConfig):
        hint = next(iter(get_args(hints[known.name])), None)
        is_optional = type(None) in get_args(hints[known.name])
        kind: Any = hint if is_optional else hints[known.name]
        default = () if is_optional else (known.default,)
        if kind is KeyValues:
            kind, default = Annotated[str, tyro.conf.arg(metavar="KEY=VALUE")], ()
        values.append((known.name, tuple[kind, ...], field(default=default)))
    # The help is that of the fields.
    space = {"__module__": __name__, "HELP_OF": TrainingConfig}
    return dataclasses.make_dataclass("TrainingValues", values, frozen=True, namespace=space)


TrainingValues: Any = _values_of_fields()


@dataclass(frozen=True)
class Sweep(CodeOptions, CommandOptions, WithDefaults):
    """Submit many runs: every training option takes several values, and their product is run.

    The same command again, or `sweep NAME`, submits what is missing.
    """

    training: TrainingValues = field(default_factory=TrainingValues)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    restarts: RestartConfig = field(default_factory=RestartConfig)

    sweep: Annotated[
        tyro.conf.Positional[OptionalStr], tyro.conf.arg(metavar="[NAME|FILE.toml]")
    ] = None
    """A sweep that the study keeps, or a file that describes one; flags win over both."""

    name: OptionalStr = None
    """Name of the sweep, and of its group in W&B if none is given; default: the file's, or the
    group's."""

    zip: tuple[str, ...] = ()
    """Fields whose values are paired instead of multiplied: lr batch_size."""

    one_at_a_time: Flag = False
    """Vary one field at a time, around the first value of each."""

    parallel: OptionalInt = None
    """Runs at a time; on a sweep that is submitted, from now on; default: as many as the cluster
    takes, or one for each GPU of this machine."""

    runs_per_gpu: OptionalInt = None
    """Runs that share a job and its GPU, cores and memory; each takes the next run when one ends.
    `flowjobs bench` measures how many are best; default: 1."""

    first: OptionalInt = None
    """Start at most this many runs."""

    yes: Flag = False
    """Submit more than 100 runs without asking."""

    dry_run: Flag = False
    """Print the plan; submit nothing."""

    @classmethod
    def with_defaults(cls, defaults: Defaults) -> "Sweep":
        """See `WithDefaults`."""
        own: dict[str, Any] = {}
        for name in ("study", "cluster"):
            if name in defaults.values:
                own[name] = defaults.values[name]
        training = defaults.fill(TrainingConfig)
        values: dict[str, tuple[Any, ...]] = {
            known.name: (getattr(training, known.name),)
            for known in dataclasses.fields(TrainingConfig)
            if getattr(training, known.name) not in (None, {})
        }
        values["arch_args"] = tuple(f"{k}={v!r}" for k, v in training.arch_args.items())
        options = {part: defaults.fill(cls) for part, cls in grid.TABLES.items()}
        return cls(training=TrainingValues(**values), **options, **own)

    @staticmethod
    def spelled_out(arguments: Sequence[str]) -> list[str]:
        """The command line with `--no-evaluate`, as `submit` has it, as `--evaluate False`."""
        negated = {
            f"--no-{flag(known.name)[2:]}": [flag(known.name), "False"]
            for known in dataclasses.fields(TrainingConfig)
            if known.type is bool
        }
        return [word for given in arguments for word in negated.get(given, [given])]

    def run(self, defaults: Defaults) -> int:
        """Submit. Returns the exit code."""
        check_counts(parallel=self.parallel, first=self.first, runs_per_gpu=self.runs_per_gpu)
        study = absolute(self.study)
        name, sweep = self._asked(study, defaults)
        check_sweep_name(study, name)
        runs, given = prepare_sweep(defaults, study, name, sweep)
        return self._carry_out(study, name, sweep, runs, given, defaults)

    def _asked(self, study: Path, defaults: Defaults) -> tuple[str, grid.Sweep]:
        """The sweep and its name."""
        values = self._values(defaults)
        group = values.get("group", [defaults.fill(TrainingConfig).group])[0]
        name = str(group) if self.name is None else self.name
        if self.sweep is None and values:
            sweep = grid.Sweep()
        elif self.sweep and (self.sweep.endswith(".toml") or "/" in self.sweep):
            file = absolute(Path(self.sweep))
            check_is_file("sweep", file)
            name = file.stem if self.name is None else self.name
            sweep = read_sweep(file)
        else:
            name = name if self.sweep is None else self.sweep
            sweep = read_saved(study, name)
        sweep = sweep.with_values(values, _given(self.slurm, defaults))
        if "--zip" in defaults.flags:
            sweep = sweep.zipped(self.zip)
        return name, dataclasses.replace(
            sweep,
            tracking={**sweep.tracking, **_given(self.tracking, defaults)},
            restarts={**sweep.restarts, **_given(self.restarts, defaults)},
            one_at_a_time=self.one_at_a_time or sweep.one_at_a_time,
            parallel=self.parallel or sweep.parallel,
            runs_per_gpu=self.runs_per_gpu or sweep.runs_per_gpu,
        )

    def _values(self, defaults: Defaults) -> dict[str, list[Any]]:
        """The values of the fields that are given as flags."""
        values: dict[str, list[Any]] = {}
        for known in dataclasses.fields(TrainingConfig):
            if flag(known.name) not in defaults.flags:
                continue
            given = getattr(self.training, known.name)
            if not given and known.type is not bool:
                raise ConfigError(f"{flag(known.name)}: found no value, expected one or more")
            if known.name == "arch_args":
                for item in given:
                    key, value = key_value(flag(known.name), item)
                    values.setdefault(f"{ARGUMENT}{key}", []).append(value)
            elif known.name in FILE_FIELDS:
                values[known.name] = [from_root(known.name, each) for each in given]
            else:
                values[known.name] = list(given) or [True]  # --compile alone
        return values

    def _carry_out(
        self,
        study: Path,
        name: str,
        sweep: grid.Sweep,
        runs: Mapping[Run, RunConfig],
        given: frozenset[str],
        defaults: Defaults,
    ) -> int:
        # The scheduler's side is slow to load, and --help does without.
        from flowjobs.jobs.executors import check_meant_for_here, choose_cluster
        from flowjobs.jobs.run_stages import TO_START
        from flowjobs.sweeps.plan import look_at, with_other_code

        cluster, why = choose_cluster(self.cluster)
        if cluster == "debug":
            raise ConfigError(
                "--cluster debug runs one run in this process: submit one run of the sweep"
            )
        # A saved one from before this was an error is carried out; the plan says what comes of it.
        if cluster == "slurm" and (self.parallel or self.runs_per_gpu):
            check_parallel(sweep.parallel, sweep.runs_per_gpu)
        names, where = [run.name for run in runs], cluster_flag(self, defaults)
        again = hint("sweep", name, *self.flags(), *where, study=study)
        retry = hint("retry", name, *where, study=study)
        if self.sweep is None and self.name is None:
            check_same(study, name, names)
        locks = cluster == "slurm" and not self.dry_run
        with ExitStack() as stack:
            stack.enter_context(only_submitter(study, locks))
            members = look_at(runs, given)
            asked = [member for member in members if member.stage in TO_START]
            able = that_can_be_started(asked)
            # The exit code if nothing else goes wrong.
            code_at_best = EXIT_BAD_INPUT if len(able) < len(asked) else 0
            starting = able[: self.first]
            left = len(able) - len(starting)
            to_start = [member.run for member in starting]
            check_meant_for_here((cluster, why), defaults.flags, to_start)
            check_ranks_of(starting, cluster)
            code = plan_code_of(starting, self.code_choice())
            on = f"{cluster} ({why})"
            _print_plan(defaults, name, sweep, members, starting, on, retry, left)
            print_notes(plan.note for plan in code)
            if others := with_other_code(members, code):
                print(f"with other code than the new ones: {first_of(others)}")
            if lost := left_out(study, name, names):
                print(f"no longer in the sweep, unchanged: {first_of(lost)}")
            if self.dry_run:
                return code_at_best
            if len(starting) > ASKS_ABOVE and not self.yes:
                stack.close()  # nobody is to wait for an answer, and what there is may change
                if not confirmed(
                    f"submit {len(starting)} runs?",
                    f"{len(starting)} runs: sweep asks first, and stdin is not a terminal: add "
                    "--yes, or --first N for some of them",
                ):
                    return 0
                stack.enter_context(only_submitter(study, locks))
                members = look_at(runs, given)
                starting, code = _still_to_start(starting, code, members)
            save_sweep(study, name, sweep, names)
            if "--wandb-mode" in defaults.flags:
                _note_mode_of_finished(members)
            slots = sweep.runs_per_gpu
            if cluster == "slurm":
                if self.parallel and not starting and share(members, [], self.parallel, slots)[0]:
                    print_parallel(members, [], self.parallel, slots)
                submit_many(starting, code, name, sweep.parallel, slots, again, [name], members)
                return code_at_best
        return train_many_here(starting, code, sweep.parallel, slots, again) or code_at_best


def _note_mode_of_finished(members: Sequence["Member"]) -> None:
    """As `submit` does: `sync` goes by a run's config."""
    for member in members:
        if member.stage == "finished" and not member.why:
            try:
                note = member.run.create(member.config)
            except (FlowjobsError, OSError) as error:
                note = f"{member.run.name}: its W&B mode stays as it is: {error}"
            print_notes([note])


def _given(part: Any, defaults: Defaults) -> dict[str, Any]:
    """The options that are given as flags."""
    return {
        known.name: getattr(part, known.name)
        for known in dataclasses.fields(part)
        if defaults.flags & {flag(known.name), flag(f"no_{known.name}")}
    }


def _print_plan(
    defaults: Defaults,
    name: str,
    sweep: grid.Sweep,
    members: Sequence["Member"],
    starting: Sequence["Member"],
    cluster: str,
    retry: str,
    left: int,
) -> None:
    """Print what there is of the runs, and what is to be started."""
    from flowjobs.sweeps.plan import checkpoint_bytes

    how = f" = {sweep.description}" if sweep.description else ""
    print_rows(sweep=f"{name}: {counted(len(members))}{how}", cluster=cluster)
    if sizes := size_words(member.config.training for member in members):
        print_rows(size=sizes)
    by_stage: dict[str, list[Member]] = {}
    for member in members:
        by_stage.setdefault(member.stage, []).append(member)
    for stage, found in sorted(by_stage.items()):
        print(f"{stage:10} {len(found)}{_why(stage, found, retry)}")
        if stage in ("running", "waiting", "failed", "cancelled"):
            _print_shorter(found)
    if not starting:
        print("nothing to submit")
        return
    print_rows(tracking=defaults.tracking_in_words(starting[0].config.tracking))
    if not cluster.startswith("local"):
        print_resources(starting, sweep.parallel, sweep.runs_per_gpu)
    if left:
        print(f"{'':10} {left} more of them are left for later (--first {len(starting)})")
    if sweep.parallel and cluster.startswith("local"):
        print(f"{'':10} {sweep.parallel} at a time")
    elif sweep.parallel:
        print_parallel(members, starting, sweep.parallel, sweep.runs_per_gpu)
    if disk := checkpoint_bytes(members, starting):
        print_rows(disk=disk_words(disk, members[0].run.study))


def _print_shorter(members: Sequence["Member"]) -> None:
    """Print which runs, that are not started now, are not as long as is asked for."""
    from flowjobs.sweeps.plan import shorter_than_asked

    for length, count in Counter(map(shorter_than_asked, members)).items():
        if length:
            once = "once finished, the same command extends them"
            print(f"{'':10} {counted(count)} still with {length}: {once}")


def _still_to_start(
    starting: Sequence["Member"], code: Sequence["CodePlan"], members: Sequence["Member"]
) -> "tuple[list[Member], list[CodePlan]]":
    """What is left of runs that were to be started, as they are now; the others are told of."""
    from flowjobs.jobs.run_stages import TO_START

    now = {member.run: member for member in members}
    stages = Counter(now[member.run].stage for member in starting)
    for stage, count in stages.items():
        if stage not in TO_START:
            print(f"{stage:10} {count} of them by now: not started")
    both = zip(starting, code, strict=True)
    left = [(now[m.run], plan) for m, plan in both if now[m.run].stage in TO_START]
    return [member for member, _ in left], [plan for _, plan in left]


def _why(stage: str, members: Sequence["Member"], retry: str) -> str:
    """What to know of the runs of a stage, to be read behind their number."""
    from flowjobs.jobs.run_stages import held_for, lacks_best
    from flowjobs.sweeps.plan import same_as_others

    names = [member.run.name for member in members]
    match stage:
        case "failed":
            causes = Counter(member.why for member in members).most_common()
            words = ", ".join(f"{count} {cause}" for cause, count in causes)
            return f": {words} ({first_of(names)}); {retry} starts them again"
        case "cancelled":
            return f" ({first_of(names)}); {retry} starts them again"
        case "waiting":
            return "".join(f"\n{'':10} waits {why}" for why in held_for(members))
        case "new":
            if same := same_as_others(members):
                return f"\n{'':10} there already: {first_of(same)}"
        case "unknown":
            return "".join(f"\n{'':10} {m.run.name}: {m.why}" for m in members[:3])
        case "finished":
            early = [member.run.name for member in members if member.why]
            gone = [member.run.name for member in members if lacks_best(member.run)]
            notes = {
                "ran out of patience: to train more epochs they need more --patience too": early,
                "have no best.pt any more: to train them again, remove them first": gone,
            }
            return "".join(
                f"\n{'':10} {len(those)} of them {what}: {first_of(those)}"
                for what, those in notes.items()
                if those
            )
    return ""
