"""The run that is disturbed, and the same one left in peace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowjobs.runs.run import Run
from tests.cluster.slurm import SlurmCluster
from tests.conftest import Command
from tests.jobs.disturbed import OPTIONS, REPOSITORY, Disturbed, Start


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "flowjobs", "train", *OPTIONS, "--name", "whole"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "WANDB_MODE": "disabled",  # it wins over the option
    }
    subprocess.run(command, check=True, env=environment, cwd=folder, timeout=240)
    return Run(folder / "study", "whole")


@pytest.fixture
def start(
    slurm: SlurmCluster, flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> Start:
    """Submits the run and waits until it trains; it gets no further before it is disturbed."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # On a machine that is busy with other things wandb takes minutes to start.
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "240")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "240")

    def start(
        *options: str, step: int = 10, noted: bool = True, told: str | None = None
    ) -> Disturbed:
        Path("control").write_text(told or f"await {step}")
        if not noted:  # held, until it is as if its submitter had died before it noted the job
            options = (*options, "--sbatch", "hold=True")
        done = flowjobs("submit", *OPTIONS, "--name", "disturbed", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        run = Run(study, "disturbed")
        disturbed = Disturbed(run, run.submissions()[-1].job_id, slurm)
        if not noted:
            run.jobs_file.unlink()
            run.origin_file(disturbed.job_id).unlink()
            slurm.run("scontrol", "release", disturbed.job_id)
        if told is None:
            disturbed.wait_for_step(step)
        return disturbed

    return start
