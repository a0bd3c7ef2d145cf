"""flowjobs cancel."""

from dataclasses import dataclass, field
from pathlib import Path

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.prepare import RunNames, existing_run
from flowjobs.errors import ConfigError
from flowjobs.runs.run import default_study


@dataclass(frozen=True)
class Cancel:
    """Cancel runs for good: nothing starts them again until they are submitted again."""

    names: RunNames
    """Names of the runs."""

    study: Path = field(default_factory=default_study)
    """Root of the study."""

    def run(self, defaults: Defaults) -> int:
        """Cancel. Returns the exit code."""
        from flowjobs.jobs.cancel import cancel

        if not self.names:
            raise ConfigError("cancel: found no name, expected those of the runs to cancel")
        runs = [existing_run(self.study, name) for name in self.names]
        for run in runs:
            for line in cancel(run):
                print(line)
        return 0
