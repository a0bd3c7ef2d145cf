"""What submitit pickles and runs on the node, the same under every executor."""

import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from flowjobs.errors import FlowjobsError
from flowjobs.runs.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunTask:
    """What submitit pickles: the folder of a run, and nothing else. What is on disk decides.

    Args:
        folder: `STUDY/runs/NAME`, absolute.
    """

    folder: str

    def __call__(self) -> None:
        """Run the job; its exit code is the outcome's. A bug raises."""
        # Not at the top: a job may submit its run again, and so this task.
        from flowjobs.jobs.training_job import train_run

        log_to_stderr()
        run = Run.at(Path(self.folder))
        try:
            code = train_run(run)
        except FlowjobsError as error:
            logger.error("%s", error)
            code = error.exit_code
        finally:
            # submitit's handler would requeue the job, whatever became of the run.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if code:
            sys.exit(code)


def log_to_stderr() -> None:
    """Set up logging for a process that trains."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # submitit has handlers of its own.
    logging.getLogger("submitit").propagate = False


def log_to_file(path: Path) -> None:
    """Copy the log of a process in the foreground to a file, for `flowjobs logs`."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.getLogger().handlers[0].formatter)
    logging.getLogger().addHandler(handler)
