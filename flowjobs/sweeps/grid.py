"""The runs that a sweep stands for: values by field, and how they are combined.

`sweeps/NAME.toml` holds what was asked for, as a person could have written it:

    one_at_a_time = true              # one field varies at a time, around the first values
    parallel = 8
    runs_per_gpu = 4
    [base]                            # of all runs
    epochs = 100
    [grid]                            # the product of these
    arch = ["mlp", "my_models:Wide"]
    seed = [0, 1, 2]
    [grid.arch_args]
    width = [256, 512]
    [[zip]]                           # walked together, and multiplied with the rest
    lr = [1e-3, 3e-4]
    batch_size = [64, 256]
    [[include]]                       # a run more
    arch = "mlp"
    epochs = 400
    [[exclude]]                       # none that has all of these
    arch = "mlp"
    seed = [1, 2]
    [slurm]
    mem_gb = 16

"None" stands for no value (`init_from = ["None", "a/best.pt"]`). What only some runs have a use for
(ot_batch, of otcfm and not of icfm) is theirs alone: see `applying`. Of the options of `[slurm]`
each run may have its own: in `[grid]`, `[[zip]]` and `[[include]]` they stand beside the fields of
the training.
Knows no run, and none of what is on disk but that file.
"""

import functools
import hashlib
import itertools
import json
import re
import tomllib
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flowjobs.config import IN_NAME, PARTS, KeyValues, SlurmConfig, TrainingConfig, flag
from flowjobs.errors import ConfigError
from flowjobs.flows.uses import has_use
from flowjobs.nearest import meant
from flowjobs.sweeps.applying import ARGUMENT
from flowjobs.toml_values import typed_value

# Values by field; an argument of the model is `arch_args.width`.
Point = dict[str, Any]

LONGEST_NAME = 100
# The parts of a config that a file has as tables of their own.
TABLES = {name: cls for name, cls in PARTS.items() if name != "training"}


@dataclass(frozen=True)
class Sweep:
    """What was asked for.

    Attributes:
        base: The value of each field that all runs have.
        grid: The values of each field that is varied by itself.
        zips: Fields that are varied together; their lists are of one length.
        include: Runs beside the product.
        exclude: Of each field the values that together leave a run out.
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
    def words(self) -> str:
        """How the runs come about: "2 arch x 3 seed"."""
        axes = [f"{_distinct(values)} {_shown(name)}" for name, values in self.grid.items()]
        for group in self.zips:
            axes.append(f"{_length(group)} ({', '.join(map(_shown, group))})")
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
            " ".join(f"{_shown(name)}={'|'.join(map(str, of))}" for name, of in values.items())
            for values in self.exclude
            if not any(_has(point, values) for point in points)
        ]

    def with_values(self, values: Mapping[str, Sequence[Any]]) -> "Sweep":
        """With these values of fields in place of those that there are, also of included runs."""
        one = {name: chosen[0] for name, chosen in values.items() if len(chosen) == 1}
        several = {name: chosen for name, chosen in values.items() if len(chosen) != 1}
        zips = [{n: v for n, v in group.items() if n not in values} for group in self.zips]
        return replace(
            self,
            base={n: v for n, v in self.base.items() if n not in values} | one,
            grid={n: v for n, v in self.grid.items() if n not in values} | several,
            zips=tuple(group for group in zips if group),
            include=tuple({n: v for n, v in p.items() if n not in one} for p in self.include),
        )

    def zipped(self, names: Sequence[str]) -> "Sweep":
        """With these fields, which have several values each, walked together.

        Raises:
            ConfigError: They have not, or not equally many.
        """
        varied = {_shown(name): name for name in self.grid}
        unknown = [name for name in names if name.replace("-", "_") not in varied]
        if unknown or len(names) < 2:
            found = unknown[0] if unknown else " ".join(names)
            raise ConfigError(
                f"--zip: found {found}, expected two or more fields that have several values: "
                f"{', '.join(varied) or 'none has'}"
            )
        chosen = [varied[name.replace("-", "_")] for name in names]
        group = {name: self.grid[name] for name in chosen}
        _check_lengths("--zip", group)
        rest = {name: values for name, values in self.grid.items() if name not in group}
        return replace(self, grid=rest, zips=(*self.zips, group))


def training_of(point: Point, defaults: TrainingConfig) -> TrainingConfig:
    """The training config that a point means.

    Raises:
        ConfigError: A value cannot be used.
    """
    own = {n: v for n, v in point.items() if n in _TRAINING}
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
        parts = [f"{_shown(name)}{_word(values[name])}" for name in varied if name in values]
        name = _short("-".join([config.run_name, *parts]))
        if name in names:
            raise ConfigError(_same_name(name, found[names[name]], values))
        names[name] = number
    return list(names)


def _flat(config: TrainingConfig) -> Point:
    of = functools.partial(getattr, config)
    values = {name: of(name) for name in _TRAINING if name != "arch_args" and has_use(name, of)}
    return values | {f"{ARGUMENT}{name}": value for name, value in config.arch_args.items()}


def _varied(found: Sequence[Point]) -> list[str]:
    """The fields with several values, in the order of the config."""
    names = dict.fromkeys(name for values in found for name in values if name not in IN_NAME)
    return [
        name
        for name in names
        if (name.startswith(ARGUMENT) and any(name not in values for values in found))
        or _differ(values[name] for values in found if name in values)
    ]


def _differ(values: Iterable[Any]) -> bool:
    """Whether there are several; 1 and True are."""
    first, *others = values
    return any(type(value) is not type(first) or value != first for value in others)


def _word(value: Any) -> str:
    """A value as a part of a name; of a path what a person would call it."""
    text = Path(value.partition("@sha256:")[0]).stem if "/" in str(value) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")


def _short(name: str) -> str:
    """The name, or one of its length's limit that is as much its own."""
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def _same_name(name: str, one: Point, other: Point) -> str:
    differ = [n for n in {**one, **other} if one.get(n) != other.get(n)]
    lines = [f"  {flag(_shown(n))}: {one.get(n)} and {other.get(n)}" for n in differ]
    label = "; LABEL=package.module:Name gives a model a name of its own"
    return "\n".join(
        [
            f"two runs of the sweep would both be named {name}:",
            *(lines or ["  they differ in options of the cluster alone"]),
            f"leave one out{label if 'arch' in differ else ''}",
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


def _shown(name: str) -> str:
    return name.removeprefix(ARGUMENT)


def _distinct(values: Sequence[Any]) -> int:
    return len({json.dumps(value, sort_keys=True) for value in values})


def _length(group: Mapping[str, Sequence[Any]]) -> int:
    return len(next(iter(group.values())))


def _check_lengths(where: str, group: Mapping[str, Sequence[Any]]) -> None:
    if len({len(values) for values in group.values()}) > 1:
        counts = ", ".join(f"{len(values)} of {_shown(name)}" for name, values in group.items())
        raise ConfigError(f"{where}: found {counts}, expected equally many of each")


# In the order of the config, in which a name has them.
_TRAINING = tuple(known.name for known in fields(TrainingConfig))
_SLURM = tuple(known.name for known in fields(SlurmConfig))


class _Reader:
    """Reads one file; every error says where."""

    def __init__(self, path: Path) -> None:
        self._path = path
        hints = typing.get_type_hints
        self._run_hints = hints(SlurmConfig) | hints(TrainingConfig)

    def read(self) -> Sweep:
        try:
            found = tomllib.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{self._path}: {error}") from error
        tables = {"base", "grid", "zip", "include", "exclude", *TABLES}
        known = {*tables, "one_at_a_time", "parallel", "runs_per_gpu"}
        for key in found:
            if key not in known:
                raise self._error(key, f"no part of a sweep; {meant(key, known, 'of them')}")
        one_at_a_time, parallel = found.get("one_at_a_time", False), found.get("parallel")
        if type(one_at_a_time) is not bool:
            raise self._error("one_at_a_time", f"{one_at_a_time!r}, expected true or false")
        for name in ("parallel", "runs_per_gpu"):
            number = found.get(name, 1)
            if type(number) is not int or number < 1:
                raise self._error(name, f"{number!r}, expected a number of runs")
        sweep = Sweep(
            base=self._one_of_each("base", self._table("base", found.get("base", {}))),
            grid=self._several("grid", self._table("grid", found.get("grid", {}))),
            zips=tuple(self._zip(group) for group in self._tables("zip", found)),
            include=tuple(
                self._one_of_each("include", group) for group in self._tables("include", found)
            ),
            exclude=tuple(self._exclusion(group) for group in self._tables("exclude", found)),
            one_at_a_time=one_at_a_time,
            parallel=parallel,
            runs_per_gpu=found.get("runs_per_gpu", 1),
            **{name: self._options(name, found.get(name, {})) for name in TABLES},
        )
        places = [("base", sweep.base), ("grid", sweep.grid)]
        seen: dict[str, str] = {}
        for where, table in places + [("zip", group) for group in sweep.zips]:
            for name in table:
                if name in seen:
                    words = f"{_shown(name)} in [{seen[name]}] too, expected it in one of them"
                    raise self._error(f"[{where}]", words)
                seen[name] = where
        return sweep

    def _exclusion(self, group: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        if not group:
            raise self._error("[[exclude]]", "no field, and all runs would be left out")
        return self._several("exclude", group, scalars=True)

    def _zip(self, group: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        values = self._several("zip", group)
        _check_lengths(f"{self._path}: [[zip]]", values)
        return values

    def _one_of_each(self, where: str, table: Mapping[str, Any]) -> Point:
        return {name: self._typed(where, name, value) for name, value in table.items()}

    def _several(
        self, where: str, table: Mapping[str, Any], *, scalars: bool = False
    ) -> dict[str, Sequence[Any]]:
        found: dict[str, Sequence[Any]] = {}
        for name, values in table.items():
            listed = [values] if scalars and not isinstance(values, list) else values
            if not isinstance(listed, list) or not listed:
                raise self._error(
                    f"[{where}] {name}",
                    f"{values!r}, expected a list of one or more (one value for all: [base])",
                )
            found[name] = [self._typed(where, name, value) for value in listed]
        return found

    def _options(self, name: str, table: Any) -> dict[str, Any]:
        hints = typing.get_type_hints(TABLES[name])
        options = {}
        for key, value in self._table(name, table).items():
            option = key.replace("-", "_")
            if option not in hints:
                raise self._error(f"[{name}] {key}", f"no option; {meant(key, hints, 'options')}")
            options[option] = self._as(f"[{name}] {key}", option, value, hints[option])
        return options

    def _table(self, where: str, table: Any) -> dict[str, Any]:
        """A table with the arguments of the model as keys of their own, and plain field names."""
        if not isinstance(table, dict):
            raise self._error(where, f"{table!r}, expected a table of fields")
        flat: dict[str, Any] = {}
        for key, value in table.items():
            name = key.replace("-", "_")
            if name == "arch_args" and isinstance(value, dict):
                flat |= {f"{ARGUMENT}{argument}": given for argument, given in value.items()}
            else:
                flat[name] = value
        return flat

    def _tables(self, name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
        listed = found.get(name, [])
        if not isinstance(listed, list):
            raise self._error(name, f"{listed!r}, expected [[{name}]]")
        return [self._table(name, table) for table in listed]

    def _typed(self, where: str, name: str, value: Any) -> Any:
        if name.startswith(ARGUMENT):
            return self._as(f"[{where}] {name}", name, value, Any)
        if name not in self._run_hints or (where == "base" and name not in _TRAINING):
            known: Collection[str] = _TRAINING
            raise self._error(f"[{where}] {name}", f"no field; {meant(name, known, 'fields')}")
        return self._as(f"[{where}] {name}", name, value, self._run_hints[name])

    def _as(self, where: str, name: str, value: Any, hint: Any) -> Any:
        try:
            return typed_value(name, value, hint, self._path.parent)
        except TypeError as error:
            raise self._error(where, str(error)) from error

    def _error(self, where: str, found: str) -> ConfigError:
        return ConfigError(f"{self._path}: {where}: found {found}")


def read_sweep(path: Path) -> Sweep:
    """What a file asks for; relative paths in it begin at its folder.

    Raises:
        ConfigError: It is not TOML, has a key that is no field, or a value of another type.
    """
    return _Reader(path).read()


def to_toml(sweep: Sweep) -> str:
    """The text of a file that asks for the same."""
    blocks = []
    top = {
        "one_at_a_time": sweep.one_at_a_time or None,
        "parallel": sweep.parallel,
        "runs_per_gpu": sweep.runs_per_gpu if sweep.runs_per_gpu > 1 else None,
    }
    blocks.append(_lines("", top))
    for name in ("base", "grid"):
        blocks.append(_lines(f"[{name}]", getattr(sweep, name)))
    for name in ("zip", "include", "exclude"):
        groups = sweep.zips if name == "zip" else getattr(sweep, name)
        blocks += [_lines(f"[[{name}]]", group) for group in groups]
    blocks += [_lines(f"[{name}]", getattr(sweep, name)) for name in TABLES]
    return "\n".join(block for block in blocks if block)


def _lines(head: str, table: Mapping[str, Any]) -> str:
    given = {name: value for name, value in table.items() if value is not None}
    if not given:
        return ""
    lines = [head] if head else []
    # A dotted key is that argument in the table arch_args.
    for name, value in given.items():
        argument = name.startswith(ARGUMENT)
        key = f"{ARGUMENT}{_quoted(_shown(name))}" if argument else name
        lines.append(f"{key} = {_toml(value)}")
    return "".join(f"{line}\n" for line in lines)


def _toml(value: Any) -> str:
    match value:
        case Mapping():
            inner = ", ".join(f"{_quoted(key)} = {_toml(each)}" for key, each in value.items())
            return f"{{ {inner} }}" if inner else "{}"
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case float():
            # TOML wants digits on both sides of a point, or an exponent.
            return repr(value)
        case str() | None:
            return _quoted(str(value))  # TOML has no word for None
    return json.dumps(value)


def _quoted(text: str) -> str:
    # JSON's strings are TOML's, but for one character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
