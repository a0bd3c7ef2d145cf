"""What runs on the node: from the run's folder to its outcome, the same under every executor."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from flowjobs.errors import FlowjobsError, RunInterrupted
from flowjobs.jobs.environment import JobProcess, this_process
from flowjobs.jobs.preemption import StopSignals
from flowjobs.runs.run import Run
from flowjobs.runs.status import EXIT_PREEMPTED

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
        log_to_stderr()
        run = Run.at(Path(self.folder))
        try:
            train_run(run)
        except RunInterrupted as interrupted:
            logger.warning("%s", interrupted)
            sys.exit(EXIT_PREEMPTED)
        except FlowjobsError as error:
            logger.error("%s", error)
            sys.exit(error.exit_code)


def train_run(run: Run, resume_path: Path | None = None) -> None:
    """Train a run to its end in this process, from its newest checkpoint if there is one.

    Args:
        run: The run; its config is on disk.
        resume_path: Start from this checkpoint instead.

    Raises:
        RunInterrupted: A signal asked to leave; the state is saved.
        RunBusyError: Another attempt trains the run.
        FlowjobsError: The config cannot be trained.
    """
    # Armed before the slow imports: a job may be preempted while torch loads.
    with StopSignals() as signals:
        if resume_path is None and run.finished():
            logger.info("%s is finished", run.name)
            return
        process = this_process(run)
        if process.job.cluster == "none" and process.job.log:
            log_to_file(Path(process.job.log))
        _train(run, process, signals, resume_path)


def _train(run: Run, process: JobProcess, signals: StopSignals, resume_path: Path | None) -> None:
    from flowjobs.tracking.recorder import recording
    from flowjobs.training.distributed import joined_ranks
    from flowjobs.training.run_training import run_training

    use_gpu = run.config().slurm.gpus_per_node > 0
    with joined_ranks(process.rank, process.world_size, process.local_rank, use_gpu) as ranks:
        if not ranks.is_first:
            run_training(run, None, ranks, signals.reason, resume_path)
            return
        with recording(run, process.job) as recorder:
            run_training(run, recorder, ranks, signals.reason, resume_path)


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
