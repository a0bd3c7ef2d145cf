"""Flow-matching ablations as jobs on a preemptible Slurm cluster. Importing this loads no torch."""

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
