"""One rank of a run, as a process of its own: `rank_job.py RUN_FOLDER RANK WORLD_SIZE PORT`."""

import os
import subprocess
import sys
import time
from pathlib import Path

from flowjobs.errors import RunInterrupted
from flowjobs.jobs.entry import log_to_stderr
from flowjobs.jobs.signals import StopSignals
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training.ranks import joined_ranks
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


def has_gloo_threads() -> bool:
    """Whether there are any; one that has ended may be listed for a moment longer."""
    for _ in range(100):
        status = subprocess.check_output(["ps", "-L", "-o", "comm=", str(os.getpid())], text=True)
        if "gloo" not in status:
            return False
        time.sleep(0.01)
    return True


if __name__ == "__main__":
    code = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    # One that is left would abort the process if it let go of a tensor while Python ends.
    assert not has_gloo_threads()
    sys.exit(code)
