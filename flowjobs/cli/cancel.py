"""flowjobs cancel."""

import sys
from dataclasses import dataclass

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.runs_named import RunNames, check_named, list_of, runs_matching
from flowjobs.errors import SubmissionError
from flowjobs.runs.selection import names_one_run
from flowjobs.runs.status import EXIT_BAD_INPUT


@dataclass(frozen=True)
class Cancel(InStudy):
    """Cancel runs for good: nothing starts them again until they are submitted again."""

    names: RunNames
    """Names, patterns, a sweep, a group, or FIELD=VALUE (flow=otcfm state=failed)."""

    def run(self, defaults: Defaults) -> int:
        """Cancel. Returns the exit code."""
        from flowjobs.jobs.cancel import cancel_together

        check_named("cancel", self.names)
        # One whose config is damaged has jobs all the same.
        runs, broken = runs_matching(self.study, self.names)
        if len(runs) > 1 or (runs and not names_one_run(self.study, self.names)):
            print(f"cancels {list_of(runs)}", flush=True)
        failed = bool(broken)
        for _, said in cancel_together(runs):
            if isinstance(said, SubmissionError):  # the others are cancelled all the same
                print(f"error: {said}", file=sys.stderr)
                failed = True
            else:
                print(said)
        return EXIT_BAD_INPUT if failed else 0
