"""flowjobs resume."""

from dataclasses import dataclass

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.runs_named import RunName, existing_run
from flowjobs.cli.submit import SubmitOptions


@dataclass(frozen=True, kw_only=True)
class Resume(SubmitOptions):
    """Submit a run again by its name alone, with the config that it has on disk."""

    name: RunName
    """Name of the run."""

    def run(self, defaults: Defaults) -> int:
        """Submit, and follow if asked to. Returns the exit code."""
        run = existing_run(self.study, self.name)
        # Like its config, its code is what it has, whichever folder this is.
        code = self.code_choice(default="submitted")
        return self.submit_run(defaults, run, run.config(), code)
