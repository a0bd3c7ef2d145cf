"""flowjobs train."""

from dataclasses import dataclass, field
from pathlib import Path

from flowjobs.cli.defaults import CommandOptions, Defaults
from flowjobs.cli.prepare import prepare_run
from flowjobs.config import OptionalStr, SlurmConfig, TrackingConfig, TrainingConfig


@dataclass(frozen=True)
class Train(CommandOptions):
    """Train a run in this process: here, or as the last line of a batch script."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    name: OptionalStr = None
    """Name of the run; default: ARCH-FLOW-DATASET-AUG."""

    resume: Path | None = None
    """Start from this checkpoint instead of the run's last.pt; without it, the run goes on from
    last.pt if there is one."""

    def run(self, defaults: Defaults) -> int:
        """Train to the end. Returns the exit code."""
        from flowjobs.jobs.task import log_to_stderr, train_run

        run, config = prepare_run(
            defaults, self.study, self.name, self.training, SlurmConfig(), self.tracking
        )
        if note := run.create(config):
            print(note)
        log_to_stderr()
        train_run(run, self.resume)
        return 0
