"""`flowjobs train` in a job that was not submitted for its run: a person's, on the real Slurm."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.reconcile import Reconcile
from flowjobs.errors import ConfigError
from flowjobs.runs.run import Run
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.jobs.disturbed import OPTIONS, REPOSITORY, Disturbed

# What a job inherits that is submitted from inside a job of a run.
JOB_OF_A_RUN = {
    "FLOWJOBS_JOB": "999",
    "FLOWJOBS_CONTINUES": "998",
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_RESTART_COUNT": "3",
}

TRAIN = (sys.executable, "-m", "flowjobs", "train")
BY_SCRIPT = ("bash", str(REPOSITORY / "sbatch" / "train.sh"))


@pytest.mark.parametrize(
    ("command", "number", "train"),
    [
        (("srun", "--output=notebook.out"), signal.SIGINT, TRAIN),
        (("sbatch", "--output=notebook.out", "--requeue"), signal.SIGTERM, BY_SCRIPT),
    ],
    ids=["srun", "sbatch"],
)
def test_a_guest_saves_and_leaves_and_its_host_lives_on(
    slurm: SlurmCluster,
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    number: signal.Signals,
    train: tuple[str, ...],
) -> None:
    """A notebook, say, that trains a run in a terminal of its own; later the same cell again."""
    run = Run(study, "disturbed")
    run.folder.mkdir(parents=True)
    run.request_cancel()  # by a person, before the same person trains it here
    arguments = (*OPTIONS, "--name", "disturbed")
    notebook = f"{shlex.join((*train, *arguments))}; echo ended $? >> said; sleep 600"
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable}
    for name, value in (JOB_OF_A_RUN | environment).items():
        monkeypatch.setenv(name, value)
    wrapped = ("--wrap", f"bash -c {shlex.quote(notebook)}")
    what = wrapped if command[0] == "sbatch" else ("bash", "-c", notebook)
    Path("control").write_text("await 10")
    said = Path("said")
    said.touch()  # the shell makes it a moment before it writes
    with subprocess.Popen([*command, "--job-name=notebook", *what]) as process:
        job_id = wait_until(lambda: slurm.run("squeue", "-h", "-o", "%A").strip(), "a job", 120)
        job = Disturbed(run, job_id, slurm)
        job.wait_for_step(10)
        os.kill(job.status().attempts[-1].job.pid, number)
        ended = wait_until(said.read_text, "the end of train", 120, job.explain)
        assert ended == "ended 75\n"
        assert job.attempts() == [("preempted", "told to leave")]
        assert run.submissions() == []
        record = slurm.job(job_id)
        assert (record["JobState"], record["Restarts"]) == ("RUNNING", "0")
        assert record["ExcNodeList"] == "(null)"
        assert slurm.run("squeue", "-h", "-o", "%A").split() == [job_id]
        slurm.run("scancel", job_id)
        process.wait(240)


def test_a_batch_script_is_told_from_what_runs_in_its_job(
    slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # as it is submitted from a shell of srun's
    code = "import sys; from flowjobs.jobs.environment import is_batch_script"
    code += "; print(is_batch_script(sys.argv[1:]))"
    ask = f"{sys.executable} -c '{code}'"
    in_shell = shlex.join(("bash", "-c", f"{ask}; exec {ask}"))
    lines = (ask, in_shell, f"srun {in_shell}", f'timeout 600 {ask} "$@"', f"exec {ask}")
    Path("job.sh").write_text("#!/bin/bash\n" + "\n".join(lines))
    job_id = slurm.submit("--output=said", "--error=/dev/null", "job.sh", "--flow", "icfm")
    assert slurm.wait_state(job_id, {"COMPLETED", "FAILED"}) == "COMPLETED"
    own = [word == "True" for word in Path("said").read_text().split()]
    # The script's child, that one's own child, and what takes its place; the same in a step; what
    # another program starts with the script's arguments; and what takes the place of the script.
    assert own == [True, False, True, False, False, True, True]


def test_only_a_batch_script_of_a_run_says_how_its_step_ended(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match="expected only in the batch script of a run's own job"):
        Reconcile(study=study, names=("a",), exit_code=1).run(Defaults())
