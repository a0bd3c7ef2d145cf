"""Where a value comes from when no flag gives it: flowjobs.toml, and sbatch's own variables.

In order, the later wins: the built-in default, the entity, server and mode of W&B's own settings
files, flowjobs.toml in the user's config folder, the flowjobs.toml of the working directory or the
nearest folder above, SBATCH_* variables, WANDB_ENTITY, WANDB_BASE_URL and WANDB_MODE, flags.
"""

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowjobs.config import (
    PARTS,
    SlurmConfig,
    TrackingConfig,
    TrainingConfig,
)
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues, flag
from flowjobs.nearest import meant
from flowjobs.runs.run import default_study
from flowjobs.slurm.options import FIELDS_OF_OPTIONS, fields_from, variables_of
from flowjobs.toml_values import read_toml, typed_value
from flowjobs.tracking.mode import (
    mode_of_settings,
    mode_of_variable,
    server_of_settings,
    setting,
    tracking_in_words,
)
from flowjobs.working_folder import working_folder

FILE_NAME = "flowjobs.toml"


@dataclass(frozen=True, kw_only=True)
class InStudy:
    """What a command takes that is about the runs of a study."""

    study: Path = field(default_factory=default_study)
    """Root of the study."""


@dataclass(frozen=True)
class CommandOptions:
    """What `submit`, `resume`, `sweep` and `retry` take beside the config, as far as a file may set
    it."""

    study: Path = field(default_factory=default_study)
    """Root of the study; default: $FLOWJOBS_STUDY, else ./study."""

    cluster: Literal["auto", "slurm", "local", "debug"] = "auto"
    """auto: Slurm if its controller answers, else this machine; debug: in this process, under the
    debugger."""


@dataclass
class Defaults:
    """The defaults of the fields, and where each comes from.

    Attributes:
        values: By field name; only those that are not the built-in's.
        sources: The file or the variable that gave each.
        archs: The user's names for models of their own: package.module:Name by name.
        unread: The variables that are not understood, by the field that they are about.
        flags: The flags on the command line.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    archs: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()

    def fill(self, cls: Any) -> Any:
        """An instance of a command or a config with these defaults in place."""
        values = {}
        for known in dataclasses.fields(cls):
            if known.name in PARTS:
                values[known.name] = self.fill(PARTS[known.name])
            elif known.name in self.values:
                values[known.name] = self.values[known.name]
        try:
            return cls(**values)
        except ConfigError as error:
            sources = sorted({self.sources[name] for name in values if name in self.sources})
            raise ConfigError(f"{error} (from {', '.join(sources)})") from error

    def resolve_arch(self, config: TrainingConfig) -> TrainingConfig:
        """The config with a name from the `[arch]` table replaced by LABEL=package.module:Name."""
        arch = self.arch_named(config.arch)
        return config if arch == config.arch else dataclasses.replace(config, arch=arch)

    def arch_named(self, arch: str) -> str:
        """LABEL=package.module:Name of a name from the `[arch]` table; another as it is."""
        return f"{arch}={self.archs[arch]}" if arch in self.archs else arch

    def source_of(self, config: Any, name: str) -> str:
        """Where the value of a parsed config's field came from."""
        if flag(name) in self.flags:  # also where it repeats the default
            return flag(name)
        if getattr(config, name) != getattr(self.fill(type(config)), name):
            return flag(name)
        return self.sources.get(name, "default")

    def tracking_in_words(self, tracking: TrackingConfig) -> str:
        """Where in W&B a run goes, and what says so, for the row of a table."""
        name = "wandb_mode"
        same = self.values.get(name) == tracking.wandb_mode
        why = "mode of " + (self.sources[name] if same else "the run's config")
        if flag(name) in self.flags:
            why = f"{flag(name)} {tracking.wandb_mode}"
        return f"\n{'':11}".join(tracking_in_words(tracking, why))

    def check_sbatch(self, slurm: SlurmConfig) -> None:
        """Raise a ConfigError for a variable or an option of sbatch that cannot be used.

        For a job that is asked for now: records of earlier ones are read as they are.
        """
        for option, value in slurm.sbatch.items():
            use = AS_FIELDS.get(option)
            if option == "gres" and "gpu" in re.split("[:,]", str(value)):
                use = "--gpus-per-node and --gpu-type"
            if use:
                raise ConfigError(
                    f"--sbatch {option}: found {value}, which the batch file would ask for twice, "
                    f"or not at all: use {use}"
                )
            name = FIELDS_OF_OPTIONS.get(option)
            if name and (other := getattr(slurm, name)) is not None:
                raise ConfigError(
                    f"--sbatch {option}: found {value} beside {flag(name)} {other}, expected one "
                    f"of them: leave out --sbatch {option}"
                )
        for name, variable in self.unread.items():
            # A field without a value is not in the batch file: sbatch reads its variable itself.
            if getattr(slurm, name) is not None and not self._by_flag(slurm, name):
                raise ConfigError(
                    f"{variable} cannot be read as a value of {flag(name)}: give the flag, or "
                    "unset the variable"
                )
        of_all_nodes = self.sources.get("gpus_per_node") == "SBATCH_GPUS"
        if slurm.nodes > 1 and of_all_nodes and not self._by_flag(slurm, "gpus_per_node"):
            raise ConfigError(
                f"SBATCH_GPUS counts the GPUs of all {slurm.nodes} nodes together: give "
                "--gpus-per-node, or unset the variable"
            )

    def _by_flag(self, config: Any, name: str) -> bool:
        return self.source_of(config, name) == flag(name)


class WithDefaults:
    """A command for whose options a flowjobs.toml has defaults."""

    @classmethod
    def with_defaults(cls, defaults: Defaults) -> Any:
        """The command without flags."""
        return defaults.fill(cls)


# Options of sbatch that are fields, of which the batch file would have both.
AS_FIELDS = {
    "nodes": "--nodes",
    "gpus": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node and --gpu-type",
    "cpus-per-task": "--cpus-per-task",
    "ntasks": "--gpus-per-node, for there is one process per GPU",
    "ntasks-per-node": "--gpus-per-node, for there is one process per GPU",
    "signal": "--signal-delay-s",
}


def load_defaults(
    environment: Mapping[str, str] = os.environ,
    arguments: Sequence[str] = (),
    warn: Callable[[str], None] | None = None,
) -> Defaults:
    """Read the files and the variables.

    Args:
        environment: For sbatch's variables and the user's config folder.
        arguments: The command line, for the flags that are in it.
        warn: Is told of a file that cannot be used, which is no error then.

    Raises:
        ConfigError: A file that is not TOML, a key that is no field, a value of another type.
    """
    defaults = Defaults()
    of_wandb = {
        "wandb_entity": setting("entity"),
        "wandb_base_url": server_of_settings(),
        "wandb_mode": mode_of_settings(),
    }
    for name, (value, file) in of_wandb.items():
        if value:
            defaults.values[name], defaults.sources[name] = value, file
    for path in _files(environment):
        try:
            _read_file(path, defaults)
        except ConfigError as error:
            if warn is None:
                raise
            warn(str(error))
    _read_variables(environment, defaults)
    flags = (word.partition("=")[0] for word in arguments if word.startswith("--"))
    defaults.flags = frozenset(flag(word[2:]) for word in flags)
    return defaults


def _read_variables(environment: Mapping[str, str], defaults: Defaults) -> None:
    for name in ("wandb_entity", "wandb_base_url"):
        if value := environment.get(variable := name.upper(), "").strip():
            # Read once, here: an attempt that found another value would write to another W&B run.
            defaults.values[name], defaults.sources[name] = value, variable
    if mode := mode_of_variable(environment):
        # Noted with the run: a `reconcile` by cron does not have the variable.
        defaults.values["wandb_mode"], defaults.sources["wandb_mode"] = mode, "WANDB_MODE"
    for name, (variable, found) in fields_from(environment).items():
        if found is None:
            defaults.values.pop(name, None)
            defaults.unread[name] = f"{variable}={environment[variable]}"
            defaults.sources[name] = f"{defaults.unread[name]}, which sbatch reads"
        else:
            defaults.values[name] = found
            defaults.sources[name] = variable
    # Options of a file that have a variable of their own and no field.
    options = defaults.values.get("sbatch", {})
    kept = {
        option: value
        for option, value in options.items()
        if not any(variable in environment for variable in variables_of(option))
    }
    if kept != options:
        defaults.values["sbatch"] = KeyValues(kept)


def _files(environment: Mapping[str, str]) -> list[Path]:
    # Not Path.home(): in a container there may be neither $HOME nor a name of the user.
    config_home = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    files = [Path(config_home) / "flowjobs" / FILE_NAME]
    here = working_folder()
    nearest = [folder / FILE_NAME for folder in (here, *here.parents)] if here else []
    # Not Path.is_file(), an error where a folder may not be entered: a home of root's, say.
    files.extend([path for path in nearest if os.path.isfile(path)][:1])
    return [path for path in files if os.path.isfile(path)]


def _read_file(path: Path, defaults: Defaults) -> None:
    found = read_toml(path)
    archs = found.pop("arch", {})
    if isinstance(archs, dict):
        for name, place in archs.items():
            if not isinstance(place, str):
                raise ConfigError(
                    f"{path}: [arch] {name} = {place!r}, expected an import path such as "
                    '"my_models:WideNet"'
                )
        defaults.archs.update(archs)
    else:
        found["arch"] = archs
    fields = _known_fields()
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ConfigError(
                f"{path}: {key} is no option; {meant(name, fields, 'options')}, "
                "or a table [arch] of names for your own models"
            )
        # Paths are relative to the file, so that they mean the same from every folder below.
        try:
            defaults.values[name] = typed_value(name, value, fields[name], path.parent)
        except TypeError as error:
            raise ConfigError(f"{path}: {key} = {error}") from error
        defaults.sources[name] = str(path)


def _known_fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for cls in (*PARTS.values(), CommandOptions):
        fields |= typing.get_type_hints(cls)
    return fields
