"""What submitit pickles and runs on the node, the same under every executor."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from flowjobs.errors import FlowjobsError
from flowjobs.runs.run import Run

logger = logging.getLogger(__name__)

# From the run's outcome to the end of its process.
END_WITHIN_S = 10.0


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


def end_in_time(code: int) -> None:
    """Have this process end with `code` even if what the user's code has started does not end.

    The interpreter waits for every thread and process at its end, and would hold the GPU of a run
    that is over. A traceback takes a moment to be printed, so there is time for that.
    """

    def end() -> None:
        time.sleep(END_WITHIN_S)
        alive = [thread.name for thread in threading.enumerate() if not thread.daemon]
        alive += [process.name for process in multiprocessing.active_children()]
        alive.remove(threading.main_thread().name)
        logger.error(
            "the run is over, and %s did not end within %g s: ended from here",
            ", ".join(alive) or "the process",
            END_WITHIN_S,
        )
        os._exit(code)

    threading.Thread(target=end, name="end-in-time", daemon=True).start()


def log_to_stderr() -> None:
    """Set up logging for a process that trains."""
    # A log that a full disk does not take is no reason for a traceback a line.
    logging.raiseExceptions = False
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
