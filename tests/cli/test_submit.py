"""The main command on this machine: one real job through submitit's local executor."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowjobs.cli.follow import follow
from flowjobs.cli.main import run as run_command
from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import SubmissionError
from flowjobs.jobs.cancel import cancel
from flowjobs.jobs.dead_jobs import find_dead_jobs
from flowjobs.runs.hint import hint
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.process import process_lives
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, RunStatus, now
from flowjobs.tracking.page import config_for_wandb
from flowjobs.training.checkpoint import read_checkpoint
from tests.cli.test_many import ended
from tests.conftest import Command
from tests.report.made_up import made_run

QUICK = ("--cluster", "local", "--wandb-mode", "disabled", "--arch-args", "width=32", "depth=1")


def test_status_names_its_columns_and_a_path_is_a_name(flowjobs: Command, workplace: Path) -> None:
    name = "a-name-that-is-longer-than-a-terminal-would-like-it-to-be"
    run = Run(workplace / "other", name)
    run.create(RunConfig(TrainingConfig()))
    run.jobs_file.write_text("[1]\n")  # not ours: no reason to fail
    head, row = flowjobs("status", "--study", "other").stdout.splitlines()
    assert head.split() == ["run", "state", "epoch", "step", "val/loss", "best", "job"]
    assert row.split()[:2] == [name, "submitted"]
    assert flowjobs("status", name).returncode == 2  # it is in another study
    assert f"folder {run.folder}" in flowjobs("status", f"other/runs/{name}/").stdout
    assert (
        f"there are no runs in {workplace / 'othr'}" in flowjobs("status", "--study", "othr").stderr
    )


def test_submit_trains_here_to_the_end(
    flowjobs: Command, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = flowjobs("submit", "--arch", "mlp", "--flow", "icfm", "--epochs", "3", *QUICK)
    assert done.returncode == 0, done.stderr
    run = Run(study, "mlp-icfm-digits-none")
    for said in (
        "mlp-icfm-digits-none",
        str(run.folder),
        "local (--cluster local)",
        "logs -f",
        "status",
        "flowjobs cancel mlp-icfm-digits-none",
        "best validation loss",
    ):
        assert said in done.stdout
    assert run.best.exists()
    assert run.last.exists()
    assert [row["step"] for row in read_rows(run.metrics_file)][-1] == 69
    with Image.open(run.samples_picture) as picture:
        assert picture.size[0] > 100

    again = flowjobs("submit", "--epochs", "3", *QUICK)
    assert (again.returncode, len(run.submissions())) == (0, 1)
    assert "is finished" in again.stdout
    capsys.readouterr()
    assert run_command(["submit", "--epochs", "3", *QUICK, "--dry-run"]) == 0
    assert capsys.readouterr().out == again.stdout

    logs = flowjobs("logs", run.name)
    assert "finished mlp-icfm-digits-none: 3 epochs" in logs.stdout
    listed = json.loads(flowjobs("status", "--json").stdout)
    assert [(entry["run"], entry["state"], entry["step"]) for entry in listed] == [
        (run.name, "finished", 69)
    ]
    assert "attempt 1" in flowjobs("status", run.name).stdout


def test_the_last_lines_of_a_run_say_where_nothing_was_drawn_or_measured(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(study, [1.0] * 3, name="a")
    none = f"none: see {hint('logs', 'a', study=study)}"
    for picture in (none, str(run.samples_picture)):
        assert follow(run, 0, lambda: False, requeues=False) == 0
        assert f"\nsamples   {picture}\nmetrics   {none}\n" in capsys.readouterr().out
        run.samples_picture.touch()


def test_a_larger_number_of_epochs_goes_on(
    flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = ("--warmup-steps", "5")
    assert flowjobs("submit", "--epochs", "1", *QUICK, "dropout=0", *warm).returncode == 0
    run = Run(study, "mlp-icfm-digits-none")
    bare = flowjobs("submit", *QUICK, "dropout=0.0", *warm)
    assert (bare.returncode, "is finished" in bare.stdout) == (0, True)
    assert run.config().training.epochs == 1
    said = (
        "extends mlp-icfm-digits-none from 1 to 2 epochs: at step 23 the learning rate goes from 0 "
        "back up to 0.000595"
    )
    with monkeypatch.context() as of_two_gpus:
        of_two_gpus.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        plan = ("--dry-run", "--gpus-per-node", "2")
        done = flowjobs("submit", "--epochs", "2", *plan, *QUICK, "dropout=0", *warm)
    assert said in done.stdout
    assert f"{run.name} has trained with 1 rank, and would now with 2" in done.stdout
    assert run.config().training.epochs == 1
    done = flowjobs("submit", "--epochs", "2", *QUICK, "dropout=0", *warm)
    assert said in done.stdout
    status = run.status()
    assert [attempt.first_step for attempt in status.attempts] == [0, 23]
    assert status.extensions == [{"step": 23, "epochs": [1, 2]}]
    assert read_checkpoint(run.last)["extensions"] == status.extensions
    assert config_for_wandb(run)["extensions"] == status.extensions
    assert "Resumed from epoch 1, step 23" in flowjobs("logs", run.name).stdout


def test_a_status_that_is_damaged_does_not_end_the_watching(study: Path) -> None:
    run = ended(study, "run", Outcome("cancelled", 130, "cancelled"))
    sound = run.status_file.read_bytes()
    run.status_file.write_text("{")
    asked = iter([True, True])

    def alive() -> bool:
        if not next(asked, False):
            run.status_file.write_bytes(sound)  # the job's attempt has begun
        return True

    assert follow(run, 0, alive, requeues=False) == 130


def test_watching_a_job_that_is_killed_ends_with_what_status_says(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(study, "run")
    run.create(RunConfig())
    process = subprocess.Popen(["true"])
    process.wait()
    log = run.logs / "job.out"
    log.write_text("W&B: offline\n")  # which has nothing to do with it
    job = JobInfo("local", str(process.pid), str(log), socket.gethostname(), process.pid)
    RunStatus("running", attempts=[AttemptRecord(1, job, now())]).write(run.status_file)
    run.add_submission(job.job_id, "local", log)
    assert follow(run, 0, lambda: False, requeues=False) == 1
    said = capsys.readouterr().err
    assert "error: the job ended without a result: died silently (as after SIGKILL or " in said


def test_a_job_that_is_cancelled_before_it_begins_ends_the_watching(study: Path) -> None:
    run = Run(study, "run")
    run.create(RunConfig())

    def alive() -> bool:
        return "nothing will start it again" not in cancel(run)

    assert follow(run, 0, alive, requeues=True) == 130


def test_ctrl_c_detaches_and_the_job_goes_on(
    workplace: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = ("--epochs", "2000000", "--patience", "2000000")
    submitting = subprocess.Popen(
        [sys.executable, "-m", "flowjobs", "submit", *endless, *QUICK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C reaches the whole process group
    )
    assert submitting.stdout is not None
    while not (line := submitting.stdout.readline()).startswith("running, epoch "):
        assert line  # until it watches
    run = Run(study, "mlp-icfm-digits-none")
    (job,) = run.submissions()
    try:
        wait_for(lambda: run.metrics_file.exists() and run.metrics_file.stat().st_size > 0)
        os.killpg(submitting.pid, signal.SIGINT)
        _, said = submitting.communicate(timeout=400)
        assert submitting.returncode == 0
        assert "no longer watching" in said
        again = subprocess.run(submitting.args, capture_output=True, text=True, check=True)
        assert "already has local job" in again.stdout
        assert run_command(["submit", *endless, *QUICK, "--dry-run"]) == 0
        would = again.stdout.replace("was submitted", "would be submitted")
        assert capsys.readouterr().out == would
        rows_then = run.metrics_file.stat().st_size
        wait_for(lambda: run.metrics_file.stat().st_size > rows_then)
        # A kill is its user's: it saves, says so, and stays away.
        os.kill(int(job.job_id), signal.SIGTERM)
        wait_for(lambda: not process_lives(int(job.job_id), job.process))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGKILL)
    # What starts it again does so before the job ends.
    assert run.submissions() == [job]
    status = run.status()
    assert (status.state, len(status.attempts)) == ("preempted", 1)
    assert "SIGTERM" in status.reason
    assert run.last.exists()


@pytest.mark.parametrize("command", ["submit", "sweep"])
def test_what_is_meant_for_slurm_is_not_trained_here_unasked(
    study: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("PATH", "/usr/nothing")  # as cron's, which lacks the folder of sbatch
    words = [command, "--arch", "mlp", "--flow", "icfm", "--wandb-mode", "disabled"]
    said = "--partition is an option of Slurm, and sbatch is not on PATH: mend that"
    with pytest.raises(SubmissionError, match=said):
        run_command([*words, "--partition", "preempt"])
    assert not study.exists()
    # What the file has is for a machine with Slurm; and who says where, is obeyed.
    (workplace / "flowjobs.toml").write_text('partition = "preempt"\n')
    assert run_command([*words, "--dry-run"]) == 0
    assert run_command([*words, "--dry-run", "--qos", "x", "--cluster", "local"]) == 0


def test_a_run_that_was_submitted_to_slurm_is_not_resumed_here_unasked(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/nothing")
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(epochs=1), tracking=TrackingConfig(wandb_mode="disabled")))
    run.add_submission("5", "slurm", run.output_of("5"))
    job = JobInfo("slurm", "5", None, "n7", 1)
    ended = AttemptRecord(1, job, now(), ended=now(), state="failed")
    RunStatus("failed", attempts=[ended]).write(run.status_file)
    for command in (["resume", "a"], ["retry", "a"], ["retry", "a", "--dry-run"]):
        with pytest.raises(SubmissionError, match="a was last submitted to Slurm, and sbatch is"):
            run_command(command)
    assert len(run.submissions()) == 1
    assert run_command(["retry", "a", "--dry-run", "--cluster", "local"]) == 0


def test_a_dry_run_shows_the_batch_file_and_writes_nothing(
    flowjobs: Command, workplace: Path
) -> None:
    (workplace / "flowjobs.toml").write_text('partition = "preempt"\nlr = 1\n')
    done = flowjobs("submit", "--dry-run", "--mem-gb", "4", "--cluster", "local")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --partition=preempt" in done.stdout
    assert "#SBATCH --mem=4096M" in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"--partition preempt ({workplace / 'flowjobs.toml'})" in lines
    assert "--mem-gb 4.0 (--mem-gb)" in lines
    assert [path.name for path in workplace.iterdir()] == ["flowjobs.toml"]


def test_a_dry_run_shows_what_becomes_of_sbatchs_variables(
    flowjobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_SIGNAL", "USR2@60")
    monkeypatch.setenv("SBATCH_MEM_PER_NODE", "2G")
    monkeypatch.setenv("SBATCH_RESERVATION", "course")
    monkeypatch.setenv("SBATCH_OUTPUT", "elsewhere")
    done = flowjobs("submit", "--dry-run", "--mem-gb", "4", "--cluster", "local")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --mem=4096M" in done.stdout
    assert "#SBATCH --signal=USR2@60" in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "--signal-delay-s 60 (SBATCH_SIGNAL)" in lines
    assert "--mem-gb 4.0 (--mem-gb)" in lines
    assert "SBATCH_MEM_PER_NODE 2G (not used: the batch file says it)" in lines
    assert "SBATCH_RESERVATION course (read by sbatch)" in lines
    assert "SBATCH_OUTPUT elsewhere (not used: logs are in the run's folder)" in lines


def test_debug_runs_in_the_process_and_stops_in_the_debugger(workplace: Path) -> None:
    (workplace / "broken.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, dim): super().__init__(); self.a = torch.nn.Linear(dim, dim)\n"
        "    def forward(self, x, t): lost = 42; raise RuntimeError('the bug')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "flowjobs", "submit", "--cluster", "debug", "--arch", "broken:Net"],
        env={**os.environ, "WANDB_MODE": "disabled"},
        input="p lost\nq\n",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "(Pdb) 42" in done.stdout
    assert done.returncode == 1
    run = Run(workplace / "study", "Net-icfm-digits-none")
    status = run.status()
    assert (status.state, status.reason) == (
        "failed",
        "RuntimeError (broken.py, line 4, in forward): the bug",
    )
    run.status_file.unlink()  # what is left names a job that is no process
    assert find_dead_jobs([run]) == {}


@pytest.mark.parametrize("command", ["submit", "train"])
def test_a_job_that_cannot_start_says_why_in_one_line(
    flowjobs: Command, command: str, workplace: Path
) -> None:
    np.save(workplace / "ones.npy", np.ones((100, 4), dtype=np.float32))
    where = ("--cluster", "local") if command == "submit" else ()
    done = flowjobs(command, *where, "--wandb-mode", "disabled", "--dataset", "ones.npy")
    assert done.returncode == 2
    assert "all 85 rows are the same; there is nothing to learn" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_the_log_of_a_run_in_the_foreground_is_kept(flowjobs: Command) -> None:
    assert flowjobs("train", "--epochs", "1", *QUICK[2:]).returncode == 0
    assert "finished mlp-icfm-digits-none" in flowjobs("logs", "mlp-icfm-digits-none").stdout


def test_every_command_finds_the_study_of_the_config_file(
    flowjobs: Command, workplace: Path
) -> None:
    (workplace / "flowjobs.toml").write_text('study = "elsewhere"\n')
    assert flowjobs("train", "--epochs", "1", *QUICK[2:]).returncode == 0
    assert (workplace / "elsewhere/runs").exists()
    assert "mlp-icfm-digits-none" in flowjobs("status").stdout
    assert flowjobs("logs", "mlp-icfm-digits-none").returncode == 0


def wait_for(condition: object, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
