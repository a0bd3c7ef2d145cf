"""Before a job is handed over, whether there is one; while it is, signals that end a command."""

import signal
import threading
from pathlib import Path

import pytest

from flowjobs.errors import SubmissionError
from flowjobs.jobs.submit import running_job, told_to_end_waits
from flowjobs.runs.pack import new_pack
from flowjobs.runs.status import Outcome, State
from tests.cli.test_many import ended


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
