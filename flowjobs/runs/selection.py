"""Which runs the user means: names, patterns, a sweep, a group, or fields of the config.

Reads what is on disk alone, and writes nothing. Knows neither torch nor a scheduler.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from flowjobs.config import FILE_FIELDS, PARTS, PINNED, SIZE_FIELDS, value_in_name
from flowjobs.errors import ConfigError, RunNotFoundError
from flowjobs.field_values import literal_or_text
from flowjobs.nearest import LIST_AT_MOST, did_you_mean, meant
from flowjobs.runs.run import Run, absolute, may_be_run, run_names

# What is no field of a config and selects all the same.
SWEEP = "sweep"
# Before the name of an argument of a model that the config has a field of, too.
ARGUMENT = "arch_args."


@dataclass(frozen=True)
class Selection:
    """The runs that are meant.

    Attributes:
        runs: In the order of the words, those of one word by their names; each once.
        unreadable: Runs whose config cannot be read, so that it is unknown whether they are meant,
            and why. Empty where names alone decide.
    """

    runs: list[Run]
    unreadable: dict[Run, str]


def select(study: Path, words: Sequence[str] = ()) -> Selection:
    """The runs that `words` mean; all of the study without a word.

    A word is the name of a run, the path of its folder, a shell pattern (`mlp-*`), the name of a
    sweep or of a W&B group, or `FIELD=VALUE`. The runs of all names, patterns, sweeps and groups
    are meant, and of these (or of all) the ones that have the value of every field that is given;
    a field that is given twice may have either value.

    Args:
        study: Root of the study.
        words: As the user types them.

    Raises:
        RunNotFoundError: A word, or all of them together, mean no run.
        ConfigError: There is no such field.
    """
    study = absolute(study)
    conditions = [word for word in words if is_condition(word)]
    plain = [word for word in words if not is_condition(word)]
    lookup = _Lookup(study)
    found = dict.fromkeys(run for word in plain for run in lookup.named(word))
    runs = [*found] if plain else [Run(study, name) for name in lookup.names]
    if conditions:
        runs = lookup.that_have(runs, conditions)
    return Selection(runs, lookup.unreadable)


def is_condition(word: str) -> bool:
    """Whether a word is `FIELD=VALUE`; a name or a path has no `=` after a plain word."""
    field, equals, _ = word.partition("=")
    return bool(equals) and field.removeprefix(ARGUMENT).replace("-", "_").isidentifier()


def names_one_run(study: Path, words: Sequence[str]) -> bool:
    """Whether the words are one run's own name, rather than a selection that has one run."""
    if len(words) != 1 or is_condition(words[0]):
        return False
    return _by_path(words[0]) is not None or may_be_run(Run(absolute(study), words[0]).folder)


def sweep_names(study: Path) -> list[str]:
    """The names of the sweeps of a study, sorted."""
    return sorted(file.stem for file in study.glob("sweeps/*.runs"))


def runs_of_sweep(study: Path, name: str) -> list[str]:
    """The names of a sweep's runs, in its order, made or not: the lines of `sweeps/NAME.runs`.

    Raises:
        RunNotFoundError: There is no such sweep.
        ConfigError: The file cannot be read.
    """
    file = study / "sweeps" / f"{name}.runs"
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        known = meant(name, sweep_names(study), "sweeps")
        raise RunNotFoundError(f"no sweep {name} in {study}: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}), expected a run's name a line: move it away, and "
            "repeat the sweep, which writes it anew"
        ) from error
    return text.split()


def never_made_by_sweep(study: Path, words: Sequence[str]) -> dict[str, list[str]]:
    """The runs that were never made (the cluster had no room, say) of each sweep among the words.

    What else the words ask for is not looked at.
    """
    there, sweeps = {*run_names(study)}, {*sweep_names(study)} - {*run_names(study)}
    named = [name for word in words if (name := word.removeprefix(f"{SWEEP}=")) in sweeps]
    return {name: [run for run in runs_of_sweep(study, name) if run not in there] for name in named}


def fits(fields: Mapping[str, Any], words: Sequence[str]) -> bool:
    """Whether a run of these fields, made or not, has the value of each that the words ask for."""
    asked: dict[str, list[str]] = {}
    for word in filter(is_condition, words):
        field, _, value = word.partition("=")
        if field != SWEEP:
            asked.setdefault(field.replace("-", "_"), []).append(value)
    return all(
        any(field in fields and _matches(field, fields[field], value) for value in values)
        for field, values in asked.items()
    )


class _Lookup:
    """What is known of the runs of a study; of a config only what a word asks for is read."""

    def __init__(self, study: Path) -> None:
        self._study = study
        self.unreadable: dict[Run, str] = {}
        self._sweeps: dict[str, set[str]] = {}
        self._configs: dict[Run, dict[str, Any] | None] = {}

    @functools.cached_property
    def names(self) -> list[str]:
        return run_names(self._study)

    def named(self, word: str) -> list[Run]:
        """The runs that a word without `=` means.

        Raises:
            RunNotFoundError: There is none.
        """
        if (run := _by_path(word)) is not None:
            if not may_be_run(run.folder):
                run.config()  # the error lists those that there are
            return [run]
        run = Run(self._study, word)
        if "/" not in word and may_be_run(run.folder):
            return [run]
        if set(word) & set("*?["):
            found = [name for name in self.names if fnmatchcase(name, word)]
            if not found:
                raise RunNotFoundError(
                    f"no run matches {word} in {self._study}: {meant(word, self.names, 'runs')}"
                )
            return [Run(self._study, name) for name in found]
        if word in sweep_names(self._study):
            return self._of_sweep(word)
        every = [Run(self._study, name) for name in self.names]
        if runs := [run for run in every if self._has(run, "group", word)]:
            return runs
        raise self._nothing_named(word)

    def that_have(self, runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
        """Those of the runs that have the value of each field.

        Raises:
            RunNotFoundError: None of them has.
            ConfigError: There is no such field.
        """
        asked: dict[str, list[str]] = {}
        for condition in conditions:
            field, _, value = condition.partition("=")
            asked.setdefault(field.replace("-", "_"), []).append(value)
        for field, values in asked.items():
            self._check_field(field, runs)
            for value in values:
                if not any(self._has(run, field, value) for run in runs):
                    raise self._no_such_value(field, value, runs)
        chosen = [
            run
            for run in runs
            if all(any(self._has(run, field, value) for value in asked[field]) for field in asked)
        ]
        if not chosen:
            raise RunNotFoundError(
                f"no run in {self._study} has {' and '.join(conditions)} together"
            )
        return chosen

    def _has(self, run: Run, field: str, value: str) -> bool:
        if field == SWEEP:
            if value not in self._sweeps:
                self._sweeps[value] = {*runs_of_sweep(self._study, value)}
            return run.name in self._sweeps[value]
        config = self._config(run)
        if config is None or field not in config:
            return False
        return _matches(field, config[field], value)

    def _config(self, run: Run) -> dict[str, Any] | None:
        """The fields of a run's config by name, arguments of its model among them."""
        if run not in self._configs:
            try:
                self._configs[run] = fields_of(run)
            except (ConfigError, RunNotFoundError, OSError) as error:
                self._configs[run] = None
                self.unreadable[run] = str(error)
        return self._configs[run]

    def _of_sweep(self, name: str) -> list[Run]:
        there = set(self.names)
        found = [run for run in runs_of_sweep(self._study, name) if run in there]
        if not found:
            raise RunNotFoundError(f"the sweep {name} in {self._study} has no runs yet")
        return [Run(self._study, run) for run in found]

    def _nothing_named(self, word: str) -> RunNotFoundError:
        groups = {config["group"] for config in self._configs.values() if config}
        text = f"no run, sweep or group {word} in {self._study}: {meant(word, self.names, 'runs')}"
        for what, there in {"sweeps": sweep_names(self._study), "groups": sorted(groups)}.items():
            if len(there) > LIST_AT_MOST:
                text += f"; {meant(word, there, what)}"
            elif there:
                text += f"; {what}: {', '.join(there)}"
        return RunNotFoundError(text)

    def _check_field(self, field: str, runs: Sequence[Run]) -> None:
        known = {SWEEP, *(key.name for cls in PARTS.values() for key in dataclasses.fields(cls))}
        if field in known:
            return
        arguments = {key for run in runs for key in (self._config(run) or ())} - known
        if field in arguments:
            return
        own = f", or an argument of a model: {', '.join(sorted(arguments))}" if arguments else ""
        raise ConfigError(
            f"{field}=: found no such field, expected one of the config (flow, seed, …){own}"
            f"{did_you_mean(field, known | arguments)}"
        )

    def _no_such_value(self, field: str, value: str, runs: Sequence[Run]) -> RunNotFoundError:
        if field == SWEEP:
            runs_of_sweep(self._study, value)  # or an error: there is no such sweep
            return RunNotFoundError(f"no run of the sweep {value} is in {self._study} yet")
        there = {
            str(config[field])
            for run in runs
            if (config := self._config(run)) is not None and field in config
        }
        return RunNotFoundError(
            f"no run has {field}={value} in {self._study}: {meant(value, there, 'values')}"
        )


def fields_of(run: Run) -> dict[str, Any]:
    """The fields of a run's config as JSON has them, by name, those of its model's arguments too.

    Where two parts have a field of one name, the training's counts; an argument of that name is
    `arch_args.NAME`.

    Raises:
        RunNotFoundError: There is no such run.
        ConfigError: The file does not hold a config.
    """
    found = run.read_config_file()
    for part in PARTS:
        if not isinstance(found.get(part, {}), dict):
            raise ConfigError(f"{run.config_file}: {part}: expected an object of fields")
    return fields_in(found)


def fields_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config by name, as `fields_of` has them.

    Args:
        config: The fields of each part, as JSON has them; of those that it lacks, the defaults.
    """
    flat: dict[str, Any] = {}
    for part in reversed(PARTS):
        flat |= _defaults(part) | config.get(part, {})
    arguments = flat.get("arch_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    named = {
        f"{ARGUMENT}{key}" if key in flat else key: value
        for key, value in arguments.items()
        if key not in SIZE_FIELDS
    }
    # By whichever option it was given.
    sizes = {name: arguments[name] for name in SIZE_FIELDS if name in arguments}
    return {**named, **flat, **sizes}


@functools.cache
def _defaults(part: str) -> dict[str, Any]:
    return dataclasses.asdict(PARTS[part]())


def _by_path(word: str) -> Run | None:
    """The run whose folder a word is the path of, as a shell completes it, in any study."""
    path = Path(word)
    if path.parent.name not in ("runs", "checkpoints"):
        return None
    path = absolute(path)
    return Run(path.parents[1], path.name)


def _matches(field: str, found: Any, asked: str) -> bool:
    """Whether a value of a config is the one that was typed, or matches its pattern."""
    words = {str(found), value_in_name(field, found)}
    if field == "arch":
        words.add(str(found).rpartition("=")[2])
    path = str(found).partition(PINNED)[0]
    # As a report shows it, where several files have one name.
    if field in FILE_FIELDS and path.endswith(f"/{asked}"):
        return True
    if any(fnmatchcase(word, asked) for word in words):
        return True
    # 3e-4 is 0.0003; but True is not 1.
    value = literal_or_text(asked)
    return isinstance(found, bool) is isinstance(value, bool) and bool(found == value)
