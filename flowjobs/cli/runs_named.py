"""The runs that the words of a command line select, and what is said of unreadable ones."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import tyro

from flowjobs.cli.defaults import Defaults
from flowjobs.config import PARTS, TrainingConfig
from flowjobs.errors import ConfigError, FlowjobsError, RunNotFoundError
from flowjobs.formatting import counted, counts_of, first_of
from flowjobs.nearest import LIST_AT_MOST, did_you_mean
from flowjobs.runs.hint import hint
from flowjobs.runs.progress import current_progress
from flowjobs.runs.run import Run
from flowjobs.runs.selection import (
    SWEEP,
    Selection,
    fields_in,
    fits,
    is_condition,
    never_made_by_sweep,
    select,
)

STATE = "state="
# Fields of which the file of a sweep does not say what a run that was never made would have.
NOT_OF_TRAINING = {SWEEP} | {
    field.name
    for part, cls in PARTS.items()
    if part != "training"
    for field in dataclasses.fields(cls)
} - {field.name for field in dataclasses.fields(TrainingConfig)}
# What `status` says of a run, and how far it is by that; see `jobs.run_stages.Stage`.
SHOWN_AS = {
    "preempted": ("to resume",),
    "interrupted": ("to resume",),
    "stopped": ("to resume", "new"),
    "submitted": ("waiting",),
}

RunName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunNames = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]


def existing_run(study: Path, name: str) -> Run:
    """The run of this name, or a RunNotFoundError that lists those that there are.

    The path of its folder, as a shell completes it, is a name too, and says which study it is in.
    """
    runs, unreadable = runs_matching(study, [name])
    if not runs:
        names = first_of([run.name for run in unreadable])
        raise RunNotFoundError(f"no run matches {name}; {names} could not be read and may be it")
    if len(runs) > 1:
        raise ConfigError(f"{name} is {list_of(runs)}; expected one run")
    return runs[0]


def check_named(command: str, words: Sequence[str]) -> None:
    """Raise a ConfigError unless a command that acts on runs is told on which."""
    if not words:
        raise ConfigError(f"{command}: name runs, groups or sweeps ({hint(command, 'NAME')})")


def runs_matching(study: Path, words: Sequence[str]) -> tuple[list[Run], list[Run]]:
    """The runs that the words select (all without words), whether or not their records can be read;
    and those of which that cannot be known, said on stderr."""
    meant = _meant(study, words)
    for run, why in meant.unreadable.items():
        print(f"error: {run.name}: {why}", file=sys.stderr)
    return meant.runs, [*meant.unreadable]


def _meant(study: Path, words: Sequence[str]) -> Selection:
    """What `select` finds, and of that the runs in a state that is asked for (state=failed).

    The record alone does not know it: a job may have died unnoticed, or wait.
    """
    asked = [word.removeprefix(STATE) for word in words if word.startswith(STATE)]
    found = select(study, [word for word in words if not word.startswith(STATE)])
    if not asked:
        return found
    from flowjobs.jobs.run_stages import Stage, stages

    known = [*get_args(Stage), *SHOWN_AS]
    for state in asked:
        if state not in known:
            raise ConfigError(
                f"state=: found {state or repr(state)}, expected one of {', '.join(known)}"
                f"{did_you_mean(state, known)}"
            )
    configs, unreadable = {}, dict(found.unreadable)
    for run in found.runs:
        try:
            configs[run] = run.config()
        except (FlowjobsError, OSError) as error:
            unreadable[run] = str(error)
    stage_of = {run: member.stage for run, member in stages(configs).items()}
    wanted = {stage for state in asked for stage in SHOWN_AS.get(state, (state,))}
    runs = [run for run in configs if stage_of[run] in wanted]
    if not runs and not unreadable:
        there = counts_of(Counter(stage_of.values())) or "there are none"
        raise RunNotFoundError(f"no run is {' or '.join(asked)}: {there}")
    return Selection(runs, unreadable)


def readable_runs(study: Path, words: Sequence[str]) -> tuple[list[Run], list[Run]]:
    """The runs that the words select (all without words), and those whose records cannot be read.

    One that is broken is said on stderr, and does not hide the others, unless it is itself named.
    """
    meant, broken = runs_matching(study, words)
    sound = []
    named = {Path(word).name for word in words}
    for run in meant:
        try:
            run.config()
            current_progress(run)
            run.submissions()
        except (FlowjobsError, OSError) as error:
            if run.name in named:
                raise
            print(f"error: {run.name}: {error}", file=sys.stderr)
            broken.append(run)
        else:
            sound.append(run)
    return sound, broken


def never_made(
    defaults: Defaults, study: Path, words: Sequence[str], *, always_read: bool = False
) -> dict[str, TrainingConfig | None]:
    """The runs of the sweeps among the words that were never made, but those known not to be meant.

    Args:
        defaults: For what the sweeps do not say.
        study: Root of the study, absolute.
        words: As the user types them.
        always_read: Whether to read their configs also where no word asks for a field of them.

    Returns:
        The config of each by its name; None where it is not read, or the study does not say it.
    """
    asked = [
        word
        for word in words
        if is_condition(word) and word.partition("=")[0].replace("-", "_") not in NOT_OF_TRAINING
    ]
    found: dict[str, TrainingConfig | None] = {}
    for sweep, names in never_made_by_sweep(study, words).items():
        configs: dict[str, TrainingConfig] = {}
        if names and (asked or always_read):
            from flowjobs.cli.prepare_sweep import configs_kept

            try:
                configs = configs_kept(defaults, study, sweep)
            except FlowjobsError as error:
                said = f"note: what the missing runs of {sweep} are is unknown: {error}"
                print(said, file=sys.stderr)
        for name in names:
            found[name] = configs.get(name) or found.get(name)
    return {
        name: config
        for name, config in found.items()
        if config is None or fits(fields_in({"training": config.to_dict()}), asked)
    }


def list_of(runs: Sequence[Run]) -> str:
    """How many runs these are, and the names of the first."""
    names = ", ".join(run.name for run in runs[:LIST_AT_MOST])
    more = f", … {runs[-1].name}" if len(runs) > LIST_AT_MOST else ""
    return f"{counted(len(runs))}: {names}{more}"
