"""The runs that the words of a command line mean, and what is said of those that are unreadable."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.nearest import LIST_AT_MOST
from flowjobs.runs.progress import current_progress
from flowjobs.runs.run import Run
from flowjobs.runs.selection import select
from flowjobs.words import counted

RunName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunNames = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]


def existing_run(study: Path, name: str) -> Run:
    """The run of this name, or a RunNotFoundError that lists those that there are.

    The path of its folder, as a shell completes it, is a name too, and says which study it is in.
    """
    runs = select(study, [name]).runs
    if len(runs) > 1:
        raise ConfigError(f"{name} is {list_of(runs)}; expected one run")
    return runs[0]


def check_named(command: str, words: Sequence[str]) -> None:
    """Raise a ConfigError unless a command that acts on runs is told on which."""
    if not words:
        raise ConfigError(f"{command}: name runs, groups or sweeps (flowjobs {command} NAME)")


def runs_matching(study: Path, words: Sequence[str]) -> tuple[list[Run], list[Run]]:
    """The runs that are meant, all without a word, whether or not their records can be read; and
    those of which it cannot be read whether they are meant, said on stderr."""
    meant = select(study, words)
    for run, why in meant.unreadable.items():
        print(f"error: {run.name}: {why}", file=sys.stderr)
    return meant.runs, [*meant.unreadable]


def readable_runs(study: Path, words: Sequence[str]) -> tuple[list[Run], list[Run]]:
    """The runs that are meant, all without a word, and those whose records cannot be read.

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


def list_of(runs: Sequence[Run]) -> str:
    """How many runs these are, and the names of the first."""
    names = ", ".join(run.name for run in runs[:LIST_AT_MOST])
    more = f", … {runs[-1].name}" if len(runs) > LIST_AT_MOST else ""
    return f"{counted(len(runs))}: {names}{more}"
