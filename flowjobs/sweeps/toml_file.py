"""A sweep as a file: `sweeps/NAME.toml`, or one of the user's own.

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
(ot_batch, of otcfm and not of icfm) is theirs alone: see `applying`. Each run may have its own
options of `[slurm]`: in `[grid]`, `[[zip]]` and `[[include]]` they stand beside the fields of
the training.
"""

import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowjobs.config import SlurmConfig, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.nearest import meant
from flowjobs.runs.selection import ARGUMENT
from flowjobs.sweeps.grid import TABLES, TRAINING, Point, Sweep, check_lengths, shown
from flowjobs.toml_values import NO_VALUE, read_toml, typed_value


class _Reader:
    """Reads one file; every error says where."""

    def __init__(self, path: Path) -> None:
        self._path = path
        hints = typing.get_type_hints
        self._run_hints = hints(SlurmConfig) | hints(TrainingConfig)

    def read(self) -> Sweep:
        found = read_toml(self._path)
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
                    words = f"{shown(name)} in [{seen[name]}] too, expected it in one of them"
                    raise self._error(f"[{where}]", words)
                seen[name] = where
        return sweep

    def _exclusion(self, group: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        if not group:
            raise self._error("[[exclude]]", "no field, and all runs would be left out")
        return self._several("exclude", group, scalars=True)

    def _zip(self, group: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        values = self._several("zip", group)
        check_lengths(f"{self._path}: [[zip]]", values)
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
        if name not in self._run_hints or (where == "base" and name not in TRAINING):
            raise self._error(f"[{where}] {name}", f"no field; {meant(name, TRAINING, 'fields')}")
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
    blocks.append(_lines("", {name: value for name, value in top.items() if value is not None}))
    for name in ("base", "grid"):
        blocks.append(_lines(f"[{name}]", getattr(sweep, name)))
    for name in ("zip", "include", "exclude"):
        groups = sweep.zips if name == "zip" else getattr(sweep, name)
        blocks += [_lines(f"[[{name}]]", group) for group in groups]
    blocks += [_lines(f"[{name}]", getattr(sweep, name)) for name in TABLES]
    return "\n".join(block for block in blocks if block)


def _lines(head: str, table: Mapping[str, Any]) -> str:
    if not table:
        return ""
    lines = [head] if head else []
    # A dotted key is that argument in the table arch_args.
    for name, value in table.items():
        argument = name.startswith(ARGUMENT)
        key = f"{ARGUMENT}{_quoted(shown(name))}" if argument else name
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
        case None:
            return _quoted(NO_VALUE)
        case str():
            return _quoted(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    # JSON's strings are TOML's, but for one character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
