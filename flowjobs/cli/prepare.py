"""From a parsed command to a run: checks everything that can be checked without torch."""

import dataclasses
from pathlib import Path

from flowjobs.cli.defaults import Defaults
from flowjobs.config import (
    RestartConfig,
    RunConfig,
    SlurmConfig,
    TrackingConfig,
    TrainingConfig,
    check_arch,
    is_data_file,
)
from flowjobs.runs.datasets import check_dataset
from flowjobs.runs.run import Run, check_run_name


def prepare_run(
    defaults: Defaults,
    study: Path,
    name: str | None,
    training: TrainingConfig,
    slurm: SlurmConfig | None,
    tracking: TrackingConfig,
    restarts: RestartConfig,
) -> tuple[Run, RunConfig]:
    """The run that a command means, and its config. Writes nothing.

    Args:
        defaults: For the user's names of models.
        study: Root of the study.
        name: Name of the run, or None for the config's own.
        training: What to train.
        slurm: What to ask of the cluster; None leaves it as it was asked for before.
        tracking: Where to mirror it.
        restarts: When to start it again.

    Raises:
        FlowjobsError: Something in it cannot be used.
    """
    training = defaults.resolve_arch(training)
    check_arch(training)
    # The job may start in another folder than this one.
    study = study.expanduser().absolute()
    if is_data_file(training.dataset):
        path = Path(training.dataset).expanduser().absolute()
        training = dataclasses.replace(training, dataset=str(path))
    check_dataset(training.dataset, study)
    run = Run(study, name or training.run_name)
    check_run_name(run.name)
    if slurm is not None:
        defaults.check_variables(slurm)
    else:
        slurm = run.config().slurm if run.exists() else SlurmConfig()
    return run, RunConfig(training, slurm, tracking, restarts)


def existing_run(study: Path, name: str) -> Run:
    """The run of this name, or a RunNotFoundError that lists those that there are.

    The path of its folder, as a shell completes it, is a name too, and says which study it is in.
    """
    path = Path(name).expanduser()
    if path.parent.name in ("runs", "checkpoints"):
        study = path.absolute().parents[1]
    run = Run(study.expanduser().absolute(), path.name)
    run.config()
    return run
