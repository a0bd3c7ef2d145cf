"""One rank of a run, as a process of its own: `rank_job.py RUN_FOLDER RANK WORLD_SIZE PORT`."""

import os
import subprocess
import sys
from pathlib import Path

from flowjobs.errors import RunInterrupted
from flowjobs.jobs.entry import log_to_stderr
from flowjobs.jobs.signals import StopSignals
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training import ranks
from flowjobs.training.run_training import run_training
from tests.cluster.waiting import wait_until


def main(folder: str, rank: int, world_size: int, port: str) -> int:
    log_to_stderr()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    run = Run.at(Path(folder))
    try:
        with StopSignals() as signals, ranks.joined_ranks(rank, world_size, rank, False) as own:
            if own.is_first:
                with recording(run, JobInfo.in_foreground()) as recorder:
                    run_training(run, recorder, own, signals.reason)
            else:
                run_training(run, None, own, signals.reason)
    except RunInterrupted as interrupted:
        print(interrupted)
        return 75
    return 0


def names_of_threads() -> str:
    return subprocess.check_output(["ps", "-L", "-o", "comm=", str(os.getpid())], text=True)


if __name__ == "__main__":
    ranks.LEAVE_WITHIN_S = 600.0
    code = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    # One that is left would abort the process if it let go of a tensor while Python ends. One that
    # has ended may be listed for a moment longer.
    wait_until(lambda: "gloo" not in names_of_threads(), "gloo's threads to end", 600)
    sys.exit(code)
