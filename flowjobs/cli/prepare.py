"""From a parsed command to a run: checks everything that can be checked without torch."""

import dataclasses
from pathlib import Path

from flowjobs.cli.defaults import Defaults
from flowjobs.config import RunConfig, SlurmConfig, TrackingConfig, TrainingConfig, check_arch
from flowjobs.errors import RunNotFoundError
from flowjobs.runs.datasets import check_dataset, is_data_file
from flowjobs.runs.run import Run


def prepare_run(
    defaults: Defaults,
    study: Path,
    name: str | None,
    training: TrainingConfig,
    slurm: SlurmConfig,
    tracking: TrackingConfig,
) -> tuple[Run, RunConfig]:
    """The run that a command means, and its config. Writes nothing.

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
    config = RunConfig(training, slurm, tracking)
    run.merge(config)
    return run, config


def existing_run(study: Path, name: str) -> Run:
    """The run of this name, or a RunNotFoundError that lists those that there are."""
    run = Run(study.expanduser().absolute(), name.rstrip("/").rpartition("/")[2])
    if not run.exists():
        run.config()
        raise RunNotFoundError(name)
    return run
