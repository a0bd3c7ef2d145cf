"""Before a job is handed over, whether there is one; while it is, signals that end a command."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.errors import SubmissionError
from flowjobs.jobs import plain_sbatch
from flowjobs.jobs.origin import Origin
from flowjobs.jobs.submit import running_job, told_to_end_waits
from flowjobs.runs.pack import new_pack
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome, State
from tests.cli.test_many import ended
from tests.cluster.slurm import SlurmCluster


def test_ctrl_c_waits_whichever_thread_it_reaches() -> None:
    done = threading.Event()
    # A thread that does not block it, as that of a spinner.
    other = threading.Thread(target=done.wait)
    other.start()
    assert other.ident is not None
    noted = []

    def hand_over(thread: int) -> None:
        with told_to_end_waits(), told_to_end_waits():
            signal.pthread_kill(thread, signal.SIGINT)
            done.wait(0.2)
            noted.append("the job")

    with pytest.raises(KeyboardInterrupt):
        hand_over(other.ident)
    done.set()
    assert noted == ["the job"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_an_end_on_record_counts_although_an_older_job_is_unknown(
    study: Path, state: State
) -> None:
    run = ended(study, "a", Outcome(state, 1, kind=state))  # in job 7
    run.add_submission("5", "slurm", None, identity={"slurm_cluster": "other"})
    new_pack(study, "shared", [run], 1, run.asked()).add_submission("7", "slurm", None)
    assert running_job(run) is None
    run.add_submission("9", "slurm", None, identity={"slurm_cluster": "other"})
    with pytest.raises(SubmissionError, match="what became of job 9 of a is unknown"):
        running_job(run)


def test_a_job_by_hand_that_is_submitted_again_is_noted_before_ctrl_c_counts(
    slurm: SlurmCluster, site: Callable[[str, str], None], study: Path
) -> None:
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(epochs=1)))
    Path("job.sh").write_text("#!/bin/sh\n")
    Origin.here().note(run, "7")
    run.add_submission("7", "slurm", None, again=["sbatch", "--hold", "job.sh"])
    site("sbatch", '$real "$@"; kill -INT $PPID; sleep 1')
    with pytest.raises(KeyboardInterrupt):
        plain_sbatch.resubmit(run, run.submissions()[0], None)
    assert [run.submissions()[-1]["job_id"]] == slurm.run("squeue", "-h", "-o", "%i").split()
