"""Flow-matching ablations as jobs on a preemptible Slurm cluster. Importing this loads no torch.

The way through: `cli` parses → `config` is checked → `jobs/submit.py` submits a job that holds
nothing but the run's folder (submitit writes its batch file, `slurm/submission.py` calls sbatch) →
on the node `jobs/entry.py` arms the signals, takes the run's lock and opens tracking →
`training/trainer.py` runs the steps, and knows neither Slurm nor W&B →
`training/checkpoint.py` writes; `tracking/mirror.py`, a process of its own, follows `metrics.jsonl`
to W&B → `jobs/restart.py` restarts an interrupted run, `jobs/reconcile.py` closes one that died.

The rooms, each of which imports only those behind it:
    cli         one file a command, and what they share; the only place that prints
    sweeps      grids, plans, arrays, runs of this machine     report      tables and pages
    drill       proves the promises on its user's cluster
    jobs        executors, submit, current_job, entry, signals, stop and exit causes, restart,
                reconcile
    training    trainer, state, checkpoints, ranks          tracking    W&B
    evaluation  samples of a trained model, and measures of their quality
    flows  models  data
    runs        a run on disk; every other room reads and writes it only through this one
    slurm       asking Slurm; knows no run
Beside them, for all: config, errors, user_code, user_source; notebook, the trainer of a script; and
small ones (cgroups, default_logging, field_values, formatting, from_json, learning_rate, nearest,
slots, toml_values, working_folder). The larger rooms have a map of their files: their docstring.

A run that is looked at has one of these forms: `runs.listing.Glance` (a line, of two small files),
`jobs.dead_jobs.Finding` (what became of its newest job), `jobs.run_stages.Standing` (both, for
`status`) and `Member` (with what is asked of it, for whoever starts, awaits or removes it),
`report.results.Result` (with config and measures), `cli.status.describe` (all of it, as JSON).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from flowjobs.config import RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import FlowjobsError

if TYPE_CHECKING:
    from torch import nn

    from flowjobs.evaluation.trained import TrainedModel

__version__ = "0.1.0"

__all__ = [
    "FlowjobsError",
    "RunConfig",
    "SlurmConfig",
    "TrackingConfig",
    "TrainingConfig",
    "__version__",
    "load",
]


def load(
    name: str,
    study: str | Path | None = None,
    device: str = "auto",
    model: "nn.Module | None" = None,
) -> "TrainedModel":
    """The trained model of a run: `flowjobs.load(NAME).sample(1000)`. Loads torch.

    A model of the user's own is built from the code that the run keeps, whatever the process has
    imported; what its modules import only as they are called comes from where the process imports.

    Args:
        name: Name of the run.
        study: Root of the study; by default $FLOWJOBS_STUDY, else ./study.
        device: Where to compute; "auto" is the GPU where there is one.
        model: Takes the weights, of a run whose model was made in a notebook; by default one of
            the run's `--arch`.

    Raises:
        RunNotFoundError: There is no such run.
        CheckpointError: It has no best.pt yet, or one that cannot be used.
        ConfigError: The code that it keeps is gone or was changed.
    """
    from flowjobs.runs.run import Run, absolute, default_study
    from flowjobs.training.trained import load_trained, note_weights

    run = Run(absolute(Path(study or default_study())), name)
    trained = load_trained(run, device, model)
    if model is not None:
        note_weights(model, run)  # it may be trained further
    return trained
