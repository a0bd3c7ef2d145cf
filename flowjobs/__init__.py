"""Flow-matching ablations as jobs on a preemptible Slurm cluster. Importing this loads no torch.

The way through: `cli` parses → `config` is checked → `jobs/submit.py` hands submitit a job that
holds nothing but the run's folder → on the node `jobs/entry.py` arms the signals, takes the run's
lock and opens tracking → `training/trainer.py` runs the steps, and knows neither Slurm nor W&B →
`training/checkpoint.py` writes; `tracking/mirror.py`, a process of its own, follows `metrics.jsonl`
to W&B → `jobs/restart.py` restarts an interrupted run, `jobs/reconcile.py` closes one that died.

The rooms, each of which imports only those behind it:
    cli         one file a command; the only place that prints or exits
    drill       proves the promises on its user's cluster
    jobs        executors, submit, entry, signals, stop and exit causes, restart, reconcile
    training    trainer, state, checkpoints, ranks          tracking    W&B
    evaluation  samples of a trained model
    flows  models  data
    runs        a run on disk; every other room reads and writes it only through this one
    slurm       asking Slurm; knows no run
"""

from flowjobs.config import RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import FlowjobsError

__version__ = "0.1.0"

__all__ = [
    "FlowjobsError",
    "RunConfig",
    "SlurmConfig",
    "TrackingConfig",
    "TrainingConfig",
    "__version__",
]
