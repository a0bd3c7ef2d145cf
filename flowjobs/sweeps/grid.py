"""The runs that a sweep stands for: values by field, how they are combined, and the runs' names.

Knows no run, and nothing that is on disk.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flowjobs.config import IN_NAME, PARTS, PINNED, SlurmConfig, TrainingConfig, value_in_name
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues, flag
from flowjobs.flows.uses import has_use
from flowjobs.runs.selection import ARGUMENT

# Values by field; an argument of the model is `arch_args.width`.
Point = dict[str, Any]

LONGEST_NAME = 100
# The parts of a config that a file has as tables of their own.
TABLES = {name: cls for name, cls in PARTS.items() if name != "training"}
# In the order of the config, in which a name has them.
TRAINING = tuple(known.name for known in fields(TrainingConfig))
_SLURM = tuple(known.name for known in fields(SlurmConfig))


@dataclass(frozen=True)
class Sweep:
    """What was asked for.

    Attributes:
        base: The value of each field that all runs have.
        grid: The values of each field that is varied by itself.
        zips: Fields that are varied together; their lists are of one length.
        include: Runs beside the product.
        exclude: Values by field that together leave a run out.
        slurm: Options of the cluster.
        tracking: Options of W&B.
        restarts: Options of restarts.
        one_at_a_time: Vary one field (or zip) at a time, around the first values.
        parallel: How many runs at a time; None: as many as the cluster takes.
        runs_per_gpu: How many share a job.
    """

    base: Point = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    zips: tuple[Mapping[str, Sequence[Any]], ...] = ()
    include: tuple[Point, ...] = ()
    exclude: tuple[Mapping[str, Sequence[Any]], ...] = ()
    slurm: Mapping[str, Any] = field(default_factory=dict)
    tracking: Mapping[str, Any] = field(default_factory=dict)
    restarts: Mapping[str, Any] = field(default_factory=dict)
    one_at_a_time: bool = False
    parallel: int | None = None
    runs_per_gpu: int = 1

    def points(self) -> list[Point]:
        """The runs, by the values of the fields that are given; in order, each once."""
        axes = [[{name: value} for value in values] for name, values in self.grid.items()]
        for group in self.zips:
            rows = zip(*group.values(), strict=True)
            axes.append([dict(zip(group, row, strict=True)) for row in rows])
        combined = _one_at_a_time(axes) if self.one_at_a_time else itertools.product(*axes)
        points = [_merged(self.base, *chosen) for chosen in combined]
        if self.include and not axes:
            points = []
        points += [_merged(self.base, given) for given in self.include]
        kept = [point for point in points if not any(_has(point, out) for out in self.exclude)]
        return list({json.dumps(point, sort_keys=True): point for point in kept}.values())

    @property
    def description(self) -> str:
        """How the runs come about: "2 arch x 3 seed"."""
        axes = [f"{_distinct(values)} {shown(name)}" for name, values in self.grid.items()]
        for group in self.zips:
            axes.append(f"{_length(group)} ({', '.join(map(shown, group))})")
        words = (" + " if self.one_at_a_time else " x ").join(axes)
        if self.one_at_a_time and axes:
            words += ", one at a time"
        if self.include:
            words += f"{' and ' if words else ''}{len(self.include)} included"
        if self.exclude:
            words += ", without what is excluded"
        return words

    def unused_exclusions(self) -> list[str]:
        """Those that leave out none of the runs, in words: one value may be mistyped."""
        points = replace(self, exclude=()).points() if self.exclude else []
        return [
            " ".join(f"{shown(name)}={'|'.join(map(str, of))}" for name, of in values.items())
            for values in self.exclude
            if not any(_has(point, values) for point in points)
        ]

    def with_values(self, values: Mapping[str, Sequence[Any]], slurm: Mapping[str, Any]) -> "Sweep":
        """With these values of fields, and options of the cluster, in place of those that there
        are, also of included runs."""
        one = {name: chosen[0] for name, chosen in values.items() if len(chosen) == 1}
        several = {name: chosen for name, chosen in values.items() if len(chosen) != 1}
        given, of_all = {*values, *slurm}, {*one, *slurm}
        zips = [{n: v for n, v in group.items() if n not in given} for group in self.zips]
        return replace(
            self,
            base={n: v for n, v in self.base.items() if n not in given} | one,
            grid={n: v for n, v in self.grid.items() if n not in given} | several,
            zips=tuple(group for group in zips if group),
            include=tuple({n: v for n, v in p.items() if n not in of_all} for p in self.include),
            slurm={**self.slurm, **slurm},
        )

    def zipped(self, names: Sequence[str]) -> "Sweep":
        """With these fields, which have several values each, walked together.

        Raises:
            ConfigError: They have not, or not equally many.
        """
        varied = {shown(name): name for name in self.grid}
        unknown = [name for name in names if name.replace("-", "_") not in varied]
        if unknown or len(names) < 2:
            found = unknown[0] if unknown else " ".join(names) or "no field"
            raise ConfigError(
                f"--zip: found {found}, expected two or more fields that have several values: "
                f"{' '.join(varied) or 'none has'}"
            )
        chosen = [varied[name.replace("-", "_")] for name in names]
        group = {name: self.grid[name] for name in chosen}
        check_lengths("--zip", group)
        rest = {name: values for name, values in self.grid.items() if name not in group}
        return replace(self, grid=rest, zips=(*self.zips, group))


def training_of(point: Point, defaults: TrainingConfig) -> TrainingConfig:
    """The training config that a point means.

    Raises:
        ConfigError: A value cannot be used.
    """
    own = {n: v for n, v in point.items() if n in TRAINING}
    arguments = {n.removeprefix(ARGUMENT): v for n, v in point.items() if n.startswith(ARGUMENT)}
    if arguments:
        own["arch_args"] = KeyValues({**defaults.arch_args, **arguments})
    return replace(defaults, **own)


def slurm_of(point: Point, defaults: SlurmConfig) -> SlurmConfig:
    """The options of the cluster that a point means."""
    own = {n: v for n, v in point.items() if n in _SLURM}
    return replace(defaults, **own) if own else defaults


def run_names_of(configs: Sequence[TrainingConfig]) -> list[str]:
    """A name for each run of a sweep: its own, and what the sweep varies beyond that.

    Raises:
        ConfigError: Two runs would have one name.
    """
    found = [_flat(config) for config in configs]
    varied = _varied(found)
    names: dict[str, int] = {}
    for number, (config, values) in enumerate(zip(configs, found, strict=True)):
        parts = [
            f"{shown(name)}{_word(values[name], folders)}"
            for name, folders in varied.items()
            if name in values
        ]
        name = _short("-".join([config.run_name, *parts]))
        if name in names:
            raise ConfigError(_same_name(name, found[names[name]], values))
        names[name] = number
    return list(names)


def _flat(config: TrainingConfig) -> Point:
    of = functools.partial(getattr, config)
    values = {name: of(name) for name in TRAINING if name != "arch_args" and has_use(name, of)}
    return values | {f"{ARGUMENT}{name}": value for name, value in config.arch_args.items()}


def _varied(found: Sequence[Point]) -> dict[str, int]:
    """The fields with several values, in the order of the config, and of each how many of the
    folders above a file are in its word."""
    data = {values["dataset"] for values in found}
    # As clip/train.npy and dino/train.npy: the part of the name that all runs have is the same.
    alike = len({value_in_name("dataset", each) for each in data}) < len(data)
    names = dict.fromkeys(name for values in found for name in values)
    return {
        name: _folders({str(values[name]) for values in found if name in values})
        for name in names
        if (name not in IN_NAME or (alike and name == "dataset"))
        and (
            (name.startswith(ARGUMENT) and any(name not in values for values in found))
            or _differ(values[name] for values in found if name in values)
        )
    }


def _folders(values: Iterable[str]) -> int:
    """How many folders above a file it takes to tell the values apart, as a name has them."""
    different = {value.partition(PINNED)[0] for value in values}
    for folders in range(max(value.count("/") for value in different)):
        if len({_word(value, folders) for value in different}) == len(different):
            return folders
    return 0


def _differ(values: Iterable[Any]) -> bool:
    """Whether there are several; 1 and True are."""
    first, *others = values
    return any(type(value) is not type(first) or value != first for value in others)


def _word(value: Any, folders: int = 0) -> str:
    """A value as a part of a name; of a path what a user would call it, with so many folders."""
    text = str(value)
    if "/" in text:
        file = Path(text.partition(PINNED)[0])
        text = "_".join([*file.parts[:-1][max(0, len(file.parts) - 1 - folders) :], file.stem])
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")


def _short(name: str) -> str:
    """The name, or one of its length's limit that is as much its own."""
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def _same_name(name: str, one: Point, other: Point) -> str:
    differ = [n for n in {**one, **other} if one.get(n) != other.get(n)]
    lines = [f"  {flag(shown(n))}: {one.get(n)} and {other.get(n)}" for n in differ]
    label = "; LABEL=package.module:name gives a model or a flow a name of its own"
    return "\n".join(
        [
            f"two runs of the sweep would both be named {name}:",
            *(lines or ["  they differ in options of the cluster alone"]),
            f"leave one out{label if {'arch', 'flow'} & {*differ} else ''}",
        ]
    )


def _one_at_a_time(axes: Sequence[Sequence[Point]]) -> Iterable[Sequence[Point]]:
    first = [axis[0] for axis in axes]
    yield first
    for number, axis in enumerate(axes):
        for point in axis[1:]:
            yield [*first[:number], point, *first[number + 1 :]]


def _merged(*points: Point) -> Point:
    return {name: value for point in points for name, value in point.items()}


def _has(point: Point, excluded: Mapping[str, Sequence[Any]]) -> bool:
    return all(point.get(name) in values for name, values in excluded.items())


def shown(name: str) -> str:
    """The name of a field, or of an argument of the model, as the user has it."""
    return name.removeprefix(ARGUMENT)


def _distinct(values: Sequence[Any]) -> int:
    return len({json.dumps(value, sort_keys=True) for value in values})


def _length(group: Mapping[str, Sequence[Any]]) -> int:
    return len(next(iter(group.values())))


def check_lengths(where: str, group: Mapping[str, Sequence[Any]]) -> None:
    """Raise a ConfigError unless fields that are walked together have equally many values."""
    if len({len(values) for values in group.values()}) > 1:
        counts = ", ".join(f"{len(values)} of {shown(name)}" for name, values in group.items())
        raise ConfigError(f"{where}: found {counts}, expected equally many of each")
