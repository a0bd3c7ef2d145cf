"""One rank of a run, as a process of its own: `rank_job.py RUN_FOLDER RANK WORLD_SIZE PORT`."""

import os
import sys
from pathlib import Path

from flowjobs.errors import RunInterrupted
from flowjobs.jobs.preemption import StopSignals
from flowjobs.jobs.task import log_to_stderr
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.tracking.recorder import recording
from flowjobs.training.distributed import joined_ranks
from flowjobs.training.run_training import run_training


def main(folder: str, rank: int, world_size: int, port: str) -> int:
    log_to_stderr()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    run = Run.at(Path(folder))
    try:
        with StopSignals() as signals, joined_ranks(rank, world_size, rank, False) as ranks:
            if ranks.is_first:
                with recording(run, JobInfo.in_foreground()) as recorder:
                    run_training(run, recorder, ranks, signals.reason)
            else:
                run_training(run, None, ranks, signals.reason)
    except RunInterrupted as interrupted:
        print(interrupted)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
