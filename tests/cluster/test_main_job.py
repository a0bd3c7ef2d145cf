"""The main job on the real Slurm: submitted by the command line and by hand."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowjobs.runs.lock import RunLock
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo, RunStatus
from flowjobs.training.checkpoint import read_checkpoint
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.tracking.test_wandb_offline import records_of, summary_of

SBATCH = Path(__file__).parents[2] / "sbatch"
QUICK = ("--epochs", "3", "--arch-args", "width=32", "depth=1")
MODEL = ("--arch", "mlp", "--flow", "icfm")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PYTHON", sys.executable)
    # What W&B was told too late would be in a second file.
    patient = tmp_path / "patient"
    patient.mkdir()
    limits = "tracker.SHORT_FINISH_S = tracker.LONG_FINISH_S = 600.0"
    patch = f"from flowjobs.tracking import tracker\n{limits}\n"
    (patient / "sitecustomize.py").write_text(patch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(patient), str(SBATCH.parent)]))


def submitted(done: subprocess.CompletedProcess[str]) -> str:
    """The job id that `flowjobs submit` printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return next(line[1] for line in lines if line and line[0] == "job")


def sbatch(*arguments: str) -> str:
    """Submit by hand. Returns the job id."""
    done = subprocess.run(
        ["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def output_of(run: Run) -> str:
    return "".join(path.read_text() for path in run.logs.glob("*_log.out"))


def test_submit_runs_on_slurm_to_the_end(
    slurm: SlurmCluster, flowjobs: Command, study: Path
) -> None:
    # Held, or it may have finished before the second submit asks.
    done = flowjobs("submit", *MODEL, *QUICK, "--sbatch", "hold=True")
    job_id = submitted(done)
    assert "slurm (sbatch is there and the controller answers)" in done.stdout
    assert "flowjobs cancel mlp-icfm-digits-none" in done.stdout
    run = Run(study, "mlp-icfm-digits-none")
    again = flowjobs("submit", *MODEL, *QUICK)
    assert f"already has job {job_id}" in again.stdout
    slurm.run("scontrol", "release", job_id)

    assert slurm.wait_state(job_id, {"COMPLETED", "FAILED"}, 240) == "COMPLETED", output_of(run)
    # Accounting follows within seconds.
    wait_until(
        lambda: [row["State"] for row in slurm.accounting(job_id)] == ["COMPLETED"],
        "accounting to know the job's end",
        timeout_s=120,
    )
    status = run.status()
    (attempt,) = status.attempts
    assert (attempt.state, attempt.job.cluster, attempt.job.job_id) == ("finished", "slurm", job_id)
    assert attempt.job.host in ("n1", "n2", "n3", "n4")
    assert attempt.job.gpus in ("0", "1", "2", "3")  # one of the node's four
    assert attempt.job.log == str(run.logs / f"{job_id}_0_log.out")

    assert read_checkpoint(run.last)["step"] == read_checkpoint(run.best)["step"] == 69
    assert run.samples_picture.exists()
    assert [row["step"] for row in read_rows(run.metrics_file)][-1] == 69
    found = summary_of(run)
    assert found.exit_code == 0
    assert found.summary["final_epoch"] == 2
    assert len(records_of(run, "history")) == len(list(read_rows(run.metrics_file)))

    assert "finished mlp-icfm-digits-none: 3 epochs" in flowjobs("logs", run.name).stdout
    (listed,) = json.loads(flowjobs("status", "--json").stdout)
    assert (listed["state"], listed["jobs"][0]["job_id"]) == ("finished", job_id)


def test_follow_watches_a_job_on_slurm_to_its_end(slurm: SlurmCluster, flowjobs: Command) -> None:
    done = flowjobs("submit", *MODEL, *QUICK, "--follow")
    assert submitted(done)
    assert "finished  3 epochs, best validation loss" in done.stdout


def test_sbatch_refusing_is_one_clear_error(
    slurm: SlurmCluster, flowjobs: Command, study: Path
) -> None:
    done = flowjobs("submit", *MODEL, "--partition", "nowhere")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (said,) = done.stderr.splitlines()
    assert "sbatch refused the job: sbatch: error: invalid partition specified: nowhere" in said
    assert "--partition nowhere is not one of gpu, preempt, preempt-cancel" in said
    run = Run(study, "mlp-icfm-digits-none")
    assert run.submissions() == []
    assert not run.folder.exists()
    assert not run.checkpoints.exists()

    too_many = flowjobs("submit", *MODEL, "--gpus-per-node", "64")
    assert too_many.returncode == 2
    assert "Requested node configuration is not available" in too_many.stderr


def test_sbatch_variables_and_flags_keep_their_order(
    slurm: SlurmCluster, flowjobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "preempt")
    by_variable = submitted(flowjobs("submit", *MODEL, *QUICK, "--name", "by-variable"))
    assert slurm.job(by_variable)["Partition"] == "preempt"
    by_flag = flowjobs("submit", *MODEL, *QUICK, "--name", "by-flag", "--partition", "gpu")
    assert slurm.job(submitted(by_flag))["Partition"] == "gpu"


def test_what_slurm_got_is_the_flags_value_else_the_variables(
    slurm: SlurmCluster, flowjobs: Command, monkeypatch: pytest.MonkeyPatch, study: Path
) -> None:
    variables = {
        "SBATCH_GPUS_PER_NODE": "2",
        "SBATCH_MEM_PER_NODE": "300M",
        "SBATCH_SIGNAL": "B:USR1@70",
        "SBATCH_JOB_NAME": "hidden",
        "SBATCH_GPUS_PER_TASK": "3",
        "SBATCH_NO_REQUEUE": "",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    held = ("--sbatch", "hold=True")
    by_variable = submitted(flowjobs("submit", *MODEL, "--name", "by-variable", *held))
    job = slurm.job(by_variable)
    assert job["JobName"] == "by-variable"
    assert "gres:gpu:2" in job["TresPerNode"]
    assert "TresPerTask" not in job
    assert job["MinMemoryNode"] == "300M"
    assert job["Requeue"] == "0"
    assert "--signal=USR2@70" in next((study / "runs/by-variable/logs").glob("*.sh")).read_text()

    flags = ("--gpus-per-node", "1", "--mem-gb", "0.25", "--signal-delay-s", "80")
    held = (*held, "requeue=True")
    by_flag = submitted(flowjobs("submit", *MODEL, "--name", "by-flag", *flags, *held))
    job = slurm.job(by_flag)
    assert "gres:gpu:1" in job["TresPerNode"]
    assert job["MinMemoryNode"] == "256M"
    assert job["Requeue"] == "1"
    for job_id in (by_variable, by_flag):
        subprocess.run(["scancel", job_id], check=True)


def test_submitting_from_inside_a_job(slurm: SlurmCluster, flowjobs: Command, study: Path) -> None:
    # What an interactive job, or one of a run, leaves in the environment would shape the new one.
    inherited = "FLOWJOBS_JOB=$SLURM_JOB_ID FLOWJOBS_CONTINUES=998 FLOWJOBS_SLOTS=2"
    options = shlex.join((*MODEL, *QUICK))
    submit = f"{sys.executable} -m flowjobs submit {options}"
    script = shlex.quote(str(SBATCH / "train.sh"))
    by_hand = f"SLURM_GPUS=2 sbatch --parsable {script} {options} --name by-hand > by-hand"
    terminal = f"{sys.executable} -c 'import pty, sys; pty.spawn(sys.argv[1:])'"
    shell = f"{terminal} srun --pty -n1 -N1 bash -c {shlex.quote(by_hand)}"
    command = f"export {inherited} SLURM_RESTART_COUNT=2; {submit} && {shell}"
    outer = sbatch(
        *("--array=3", "-N2", "--ntasks-per-node=3", "--mem=1G"),
        *("--output=outer.out", "--wrap", command),
    )
    assert slurm.wait_state(outer, {"COMPLETED", "FAILED"}, 240) == "COMPLETED"
    inner = Run(study, "mlp-icfm-digits-none").submissions()[0].job_id
    assert slurm.wait_state(inner, {"COMPLETED", "FAILED"}, 240) == "COMPLETED"
    assert slurm.job(inner)["NumNodes"] == "1"

    job_id = Path("by-hand").read_text().strip()
    ended = slurm.wait_state(job_id, {"COMPLETED", "FAILED"}, 60)
    assert ended == "COMPLETED", Path(f"flowjobs-{job_id}.out").read_text()
    job = Run(study, "by-hand").status().attempts[0].job
    assert (job.cluster, job.job_id, job.restart_count) == ("slurm", job_id, 0)
    assert job.started_by_user
    assert not job.packed


def test_sbatch_by_hand_is_the_same_run_as_submit(
    slurm: SlurmCluster, flowjobs: Command, study: Path
) -> None:
    by_submit = submitted(flowjobs("submit", *MODEL, *QUICK, "--name", "by-submit"))
    by_hand = sbatch(str(SBATCH / "train.sh"), *MODEL, *QUICK, "--name", "by-hand")
    for job_id in (by_submit, by_hand):
        assert slurm.wait_state(job_id, {"COMPLETED", "FAILED"}, 240) == "COMPLETED"
    first, second = Run(study, "by-submit"), Run(study, "by-hand")
    assert list(read_rows(first.metrics_file)) == list(read_rows(second.metrics_file))
    one, other = (read_checkpoint(run.best)["ema_shadow"] for run in (first, second))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert summary_of(second).exit_code == 0

    status = second.status()
    job = status.attempts[0].job
    assert (job.cluster, job.job_id) == ("slurm", by_hand)
    assert job.gpus in ("0", "1", "2", "3")
    assert "finished by-hand: 3 epochs" in flowjobs("logs", "by-hand").stdout


def test_an_array_by_hand_trains_a_list_of_runs(
    slurm: SlurmCluster, study: Path, workplace: Path
) -> None:
    lines = [" ".join((*MODEL, *QUICK, "--seed", str(s), "--name", f"seed{s}")) for s in (0, 1)]
    # As an editor may write it, and with a line in another encoding that is no run's.
    text = "\n".join(["\ufeff" + lines[0], lines[1], "# caf"])
    (workplace / "runs.txt").write_bytes(text.encode() + b"\xe9\n")
    array = sbatch("--array=1-2", str(SBATCH / "array.sh"), "runs.txt")
    for task in (1, 2):
        job_id = f"{array}_{task}"
        assert slurm.wait_state(job_id, {"COMPLETED", "FAILED"}, 240) == "COMPLETED"
        status = Run(study, f"seed{task - 1}").status()
        assert (status.state, status.attempts[0].job.job_id) == ("finished", job_id)


def test_ranks_on_several_nodes_train_one_run(
    slurm: SlurmCluster, flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--nodes", "2", "--gpus-per-node", "2", "--name", "ranks")
    run = Run(study, "ranks")
    with socket.create_server(("", 0)) as taken:  # by another job, of the same shell
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        job_id = submitted(flowjobs("submit", *MODEL, *QUICK, *options))
        assert slurm.wait_state(job_id, {"COMPLETED", "FAILED"}, 90) == "COMPLETED", output_of(run)
    status = run.status()
    assert len(status.attempts) == 1
    assert [row["step"] for row in read_rows(run.metrics_file)][-1] == 69


def test_ranks_do_not_wait_for_a_first_one_that_finds_the_run_taken(
    slurm: SlurmCluster, flowjobs: Command, study: Path
) -> None:
    options = ("--nodes", "2", "--name", "taken", "--sbatch", "hold=True")
    job_id = submitted(flowjobs("submit", *MODEL, *QUICK, *options))
    run = Run(study, "taken")
    with RunLock(run.folder, JobInfo.in_foreground()):
        subprocess.run(["scontrol", "release", job_id], check=True)
        assert slurm.wait_state(job_id, {"COMPLETED", "FAILED"}, 240) == "FAILED"
    assert "is being trained by" in output_of(run)
    assert run.status() == RunStatus()
