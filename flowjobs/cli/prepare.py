"""From a parsed command to a run: checks everything that can be checked without torch."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowjobs.cli.defaults import Defaults
from flowjobs.config import (
    FILE_FIELDS,
    KEPT_UNLESS_GIVEN,
    RestartConfig,
    RunConfig,
    SlurmConfig,
    TrackingConfig,
    TrainingConfig,
    is_path,
    signature_differences,
)
from flowjobs.errors import ConfigError
from flowjobs.field_values import flag
from flowjobs.flows.flow import check_flow
from flowjobs.flows.uses import check_uses
from flowjobs.models.imports import missing_imports
from flowjobs.models.size import with_fixed_width
from flowjobs.models.source import check_arch, check_model, check_vectors
from flowjobs.runs.code import import_from_snapshot
from flowjobs.runs.datasets import check_data, check_source, row_shape, rows_per_step, training_rows
from flowjobs.runs.run import Run, absolute, check_run_name
from flowjobs.runs.selection import sweep_names
from flowjobs.training.pinned import with_pinned_files
from flowjobs.working_folder import working_folder


def prepare_run(
    defaults: Defaults,
    study: Path,
    name: str | None,
    training: TrainingConfig,
    slurm: SlurmConfig | None,
    tracking: TrackingConfig,
    restarts: RestartConfig,
    *,
    own_code: bool = False,
) -> tuple[Run, RunConfig]:
    """The run that a command means, and its config. Writes nothing; prints warnings.

    Args:
        defaults: For the user's names of models.
        study: Root of the study.
        name: Name of the run, or None for the config's own.
        training: What to train.
        slurm: What to ask of the cluster; None leaves it as it was asked for before.
        tracking: Where to mirror it.
        restarts: When to restart it.
        own_code: Look for the user's modules in the code that the run keeps, not as it is now.

    Raises:
        FlowjobsError: Something in it cannot be used.
    """
    training = defaults.resolve_arch(training)
    # The job may start in another folder than this one.
    study = absolute(study)
    training = with_absolute_paths(training)
    run = Run(study, training.run_name if name is None else name)
    check_run_name(run.name)
    if name is not None and not run.exists() and name in sweep_names(study):
        raise ConfigError(f"--name: found {name}, which a sweep in {study} is called; give another")
    if own_code:
        import_from_snapshot(run)
    check_parts(training, study, defaults)
    before = run.config().training if run.exists() else None
    training = with_pinned_files(training, study, before)
    training = with_fixed_width(training, row_shape(training.dataset, study))
    if before and not signature_differences(before.to_dict(), training.to_dict()):
        # Only a flag changes these: a bare command resumes the run as it is.
        own = {key: getattr(before, key) for key in KEPT_UNLESS_GIVEN}
        kept = {key: value for key, value in own.items() if flag(key) not in defaults.flags}
        training = dataclasses.replace(training, **kept)
    if slurm is not None:
        tracking.check_asked(training.group)
        defaults.check_sbatch(slurm)
        warn_of_missing_imports([training])
        note_study_above(study)
    else:
        slurm = run.config().slurm if run.exists() else SlurmConfig()
    return run, RunConfig(training, slurm, tracking, restarts)


def check_parts(training: TrainingConfig, study: Path, defaults: Defaults) -> None:
    """Raise a FlowjobsError where the model, the flow or the data can surely not be used."""
    check_arch(training, defaults.archs)
    check_model(training)
    check_flow(training)
    check_uses(training)
    check_data(training.dataset, study)
    shape = row_shape(training.dataset, study)
    check_vectors(training, shape)
    if training.source != "normal":
        check_data(training.source, study, "--source")
        check_source(training.source, row_shape(training.source, study), shape)


def warn_of_missing_imports(configs: Iterable[TrainingConfig]) -> None:
    """Say what the user's modules import that is not there; a job's environment may be another."""
    modules = dict.fromkeys(module for config in configs for module in config.user_modules)
    for missing in missing_imports(modules):
        print(f"warning: {missing}", file=sys.stderr, flush=True)


def note_study_above(study: Path) -> None:
    """Where a study begins in the working directory, name the one that is in a folder above it."""
    here = working_folder()
    if here is None or study != here / "study":
        return
    for folder in (here, *here.parents):
        if os.path.isdir(folder / "study" / "runs"):
            if folder != here:
                said = f"note: a new study begins here; there is one in {folder}: cd there, or"
                other = shlex.quote(str(folder / "study"))
                print(f"{said} --study {other}", file=sys.stderr, flush=True)
            return
        # What is above is not the person's own, or another file server's.
        if str(folder) == os.path.realpath(os.path.expanduser("~")) or os.path.ismount(folder):
            return


def check_ranks(configs: Iterable[TrainingConfig], study: Path, ranks: int) -> None:
    """Raise a ConfigError where so many ranks surely cannot share a batch equally."""
    for dataset, batch_size in {(config.dataset, config.batch_size) for config in configs}:
        if ranks > 1 and (n := training_rows(dataset, study)) is not None:
            rows_per_step(batch_size, n, ranks)


def with_absolute_paths(training: TrainingConfig) -> TrainingConfig:
    """The config with the paths of files from the root."""
    fields = {name: getattr(training, name) for name in FILE_FIELDS}
    rooted: dict[str, Any] = {name: v and from_root(name, v) for name, v in fields.items()}
    if rooted == fields:
        return training  # as of most runs of a sweep, and they are many
    return dataclasses.replace(training, **rooted)


def from_root(field: str, value: str) -> str:
    """The value of a field, the path of a file from the root."""
    return str(absolute(Path(value))) if is_path(field, value) else value
