"""A sweep on disk: `sweeps/NAME.toml` as it was asked for, `NAME.runs` the names of its runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flowjobs.config import DATA_FIELDS, PINNED, TrainingConfig
from flowjobs.errors import ConfigError, FlowjobsError, RunMismatchError, RunNotFoundError
from flowjobs.formatting import first_of
from flowjobs.nearest import LIST_AT_MOST, meant
from flowjobs.runs.files import replaced_whole
from flowjobs.runs.run import Run, check_run_name
from flowjobs.runs.selection import runs_of_sweep, sweep_names
from flowjobs.sweeps.grid import Sweep
from flowjobs.sweeps.toml_file import read_sweep, to_toml


def sweep_file(study: Path, name: str) -> Path:
    """`STUDY/sweeps/NAME.toml`."""
    return study / "sweeps" / f"{name}.toml"


def check_sweep_name(study: Path, name: str) -> None:
    """Raise a ConfigError unless `name` can be a file, the name of a job, and no run's."""
    try:
        check_run_name(name)
    except ConfigError as error:
        raise ConfigError(f"the sweep's name: {error}") from error
    if Run(study, name).exists() and name not in sweep_names(study):
        raise ConfigError(
            f"the sweep's name: found {name}, which a run in {study} is called, and is meant by it "
            "in each command; give the sweep another --name"
        )


def read_saved(study: Path, name: str) -> Sweep:
    """The sweep as it was asked for last.

    Raises:
        RunNotFoundError: There is no such sweep.
        ConfigError: Its file was changed into one that cannot be read.
    """
    file = sweep_file(study, name)
    if not file.is_file():
        raise RunNotFoundError(
            f"no sweep {name or repr(name)} in {study}: "
            f"{meant(name, sweep_names(study), 'sweeps')}; give FILE.toml, or the values of fields "
            "(--seed 0 1 2)"
        )
    return read_sweep(file)


def names_of_runs(
    study: Path, name: str, configs: Sequence[TrainingConfig], new: Sequence[str]
) -> list[str]:
    """The names of a sweep's runs: those that it gives them, or that they have got before.

    A run that was named when less varied (`mlp-icfm-digits-none`, of seed 0 alone) keeps its name
    when the sweep grows (`--seed 0 1`). Where several runs of the sweep differ in their length
    alone, it is the name of the one that is as long.
    """
    left = [old for old in _runs_before(study, name) if old not in set(new)]
    before: dict[tuple[str, ...], dict[tuple[int, int], str]] = {}
    for old in left:
        try:
            training = Run(study, old).config().training
        except FlowjobsError:
            continue  # it was never made, or is broken: it is no run of this sweep then
        before.setdefault(_identity(training), {})[_length(training)] = old
    if not before:
        return [*new]  # as mostly, and a signature takes time
    identities = [_identity(config) for config in configs]
    asked = Counter(identities)
    names = []
    for config, identity, own in zip(configs, identities, new, strict=True):
        olds = before.get(identity, {})
        kept = olds.pop(_length(config), "")
        if not kept and len(olds) == asked[identity] == 1:
            kept = olds.popitem()[1]  # the same run: it is to be longer, or is long enough
        names.append(kept if kept and not Run(study, own).exists() else own)
    return names


def _identity(config: TrainingConfig) -> tuple[str, ...]:
    # Without the digests, which what is asked for does not have yet.
    names = {field: getattr(config, field) for field in ("init_from", "reflow_from")}
    asked = {field: name and name.partition(PINNED)[0] for field, name in names.items()}
    signature = (config if asked == names else replace(config, **asked)).signature
    return (signature, *(getattr(config, field) for field in DATA_FIELDS))


def _length(config: TrainingConfig) -> tuple[int, int]:
    return config.epochs, config.patience


def save_sweep(study: Path, name: str, sweep: Sweep, runs: Sequence[str]) -> None:
    """Save a sweep and the names of its runs.

    Raises:
        ConfigError: A value is none that a file of text can hold.
    """
    file = sweep_file(study, name)
    try:
        asked = to_toml(sweep).encode()
    except UnicodeEncodeError as error:
        value = error.object.splitlines()[error.object[: error.start].count("\n")]
        raise ConfigError(
            f"{file}: found bytes that are not UTF-8 in {value!r}, expected text"
        ) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (file, asked),
        (file.with_suffix(".runs"), "".join(f"{run}\n" for run in runs).encode()),
    ):
        with replaced_whole(path) as written:
            written.write(content)


def left_out(study: Path, name: str, runs: Sequence[str]) -> list[str]:
    """The runs that the sweep had, that are there, and that it has no more."""
    now = set(runs)
    return [old for old in _runs_before(study, name) if old not in now and Run(study, old).exists()]


def check_same(study: Path, name: str, runs: Sequence[str]) -> None:
    """Raise a RunMismatchError if the sweep of this name has other runs: it is another sweep."""
    if lost := left_out(study, name, runs):
        raise RunMismatchError(
            f"the sweep {name} in {study} has runs that this one has not: "
            f"{first_of(lost, LIST_AT_MOST)}; give this one a name of its own (--name), or all "
            "their values too"
        )


def _runs_before(study: Path, name: str) -> list[str]:
    return runs_of_sweep(study, name) if name in sweep_names(study) else []
