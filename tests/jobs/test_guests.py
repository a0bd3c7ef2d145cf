"""`flowjobs train` in a job that was not submitted for its run: a person's, on the real Slurm."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowjobs.runs.run import Run
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.jobs.disturbed import OPTIONS, REPOSITORY, Disturbed

# What a job inherits that is submitted from a terminal, and from inside a job of a run.
TERMINAL: dict[str, str] = {}
JOB_OF_A_RUN = {
    "FLOWJOBS_JOB": "999",
    "FLOWJOBS_CONTINUES": "998",
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_RESTART_COUNT": "3",
}


@pytest.mark.parametrize(
    ("command", "number", "inherited"),
    [
        (("srun", "--output=notebook.out"), signal.SIGINT, TERMINAL),
        (("sbatch", "--output=notebook.out", "--requeue"), signal.SIGTERM, JOB_OF_A_RUN),
    ],
    ids=["srun", "sbatch"],
)
def test_a_guest_saves_and_leaves_and_its_host_lives_on(
    slurm: SlurmCluster,
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    number: signal.Signals,
    inherited: dict[str, str],
) -> None:
    """A notebook, say, that trains a run in a terminal of its own; later the same cell again."""
    run = Run(study, "disturbed")
    run.folder.mkdir(parents=True)
    run.request_cancel()  # by a person, before the same person trains it here
    train = [sys.executable, "-m", "flowjobs", "train", *OPTIONS, "--name", "disturbed"]
    notebook = f"{shlex.join(train)}; echo ended $? >> said; sleep 600"
    for name, value in (inherited | {"PYTHONPATH": str(REPOSITORY)}).items():
        monkeypatch.setenv(name, value)
    wrapped = ("--wrap", f"srun bash -c {shlex.quote(notebook)}")
    what = wrapped if command[0] == "sbatch" else ("bash", "-c", notebook)
    with subprocess.Popen([*command, "--job-name=notebook", *what]) as process:
        job_id = wait_until(lambda: slurm.run("squeue", "-h", "-o", "%A").strip(), "a job", 120)
        job = Disturbed(run, job_id, slurm)
        job.wait_for_step(10)
        os.kill(job.status().attempts[-1].job.pid, number)
        wait_until(lambda: Path("said").exists(), "the end of train", 120, job.explain)
        assert Path("said").read_text() == "ended 75\n"
        assert job.attempts() == [("preempted", "told to leave")]
        assert run.submissions() == []
        record = slurm.job(job_id)
        assert (record["JobState"], record["Restarts"]) == ("RUNNING", "0")
        assert record["ExcNodeList"] == "(null)"
        assert slurm.run("squeue", "-h", "-o", "%A").split() == [job_id]
        slurm.run("scancel", job_id)
        process.wait(240)
