"""Several runs in one job: each keeps the promises of a run, whatever happens beside it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.config import RestartConfig, RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.field_values import KeyValues
from flowjobs.jobs import packing
from flowjobs.jobs.current_job import running_job
from flowjobs.jobs.executors import Cluster
from flowjobs.jobs.reconcile import handle_pack_end
from flowjobs.jobs.submit import SubmittedJob, submit
from flowjobs.jobs.tasks import task_of
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.pack import Pack, new_pack, pack_of
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, RunStatus, now
from tests.cli.test_many import ended
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.jobs.disturbed import (
    DEADLINE_S,
    REPOSITORY,
    Disturbed,
    assert_equal_to,
    preempt_and_wait,
)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def made(study: Path, name: str, retries: int = 0, **slurm: object) -> Run:
    """A run with a file of its own that says what its model does; see SlowModel."""
    training = TrainingConfig(
        arch="tests.jobs.slow_model:SlowModel",
        flow="icfm",
        epochs=4,
        batch_size=128,
        arch_args=KeyValues(control=f"control-{name}"),
    )
    run = Run(study, name)
    tracking = TrackingConfig(wandb_mode="disabled")
    run.create(RunConfig(training, SlurmConfig(**slurm), tracking, RestartConfig(retries=retries)))
    return run


def tell(run: Run, what: str) -> None:
    Path(f"control-{run.name}").write_text(what)


def submitted(cluster: Cluster, runs: list[Run], slots: int = 2) -> tuple[Pack, SubmittedJob]:
    pack = new_pack(runs[0].study, "pack", runs, slots, runs[0].asked())
    return pack, submit(pack, cluster, task_of(pack))


def status_of(run: Run) -> RunStatus:
    return run.status()


def attempts_of(run: Run) -> list[tuple[str, str]]:
    return [(attempt.state, attempt.kind) for attempt in status_of(run).attempts]


def explain(pack: Pack) -> Callable[[], str]:
    return lambda: "\n".join(
        [
            *(f"{run.name}: {status_of(run)}" for run in pack.runs),
            *(file.read_text() for file in pack.logs.glob("*.out")),
            *(file.read_text() for run in pack.runs for file in run.logs.glob("*.out")),
        ]
    )


def wait_for_steps(pack: Pack, *runs: Run) -> None:
    def reached() -> bool:
        return all(len(list(read_rows(run.metrics_file))) > 1 for run in runs)

    wait_until(reached, "the runs to train", DEADLINE_S, explain(pack))


def wait_for_log(pack: Pack, text: str) -> None:
    def said() -> bool:
        return any(text in file.read_text() for file in pack.logs.glob("*.out"))

    wait_until(said, repr(text), DEADLINE_S, explain(pack))


def wait_for_end(pack: Pack, job: SubmittedJob) -> None:
    wait_until(lambda: not job.alive(pack), "the job to end", DEADLINE_S, explain(pack))


def test_a_death_leaves_the_others_alone_and_its_slot_is_filled(
    study: Path, whole: Run, flowjobs: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of NVIDIA's: it notes what it is asked, and of which folder.
    control = tmp_path / "bin/nvidia-cuda-mps-control"
    control.parent.mkdir()
    control.write_text('#!/bin/sh\necho "$1$(cat)" "$CUDA_MPS_PIPE_DIRECTORY" >> "$0.calls"\n')
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{control.parent}:{os.environ['PATH']}")
    runs = [
        made(study, name, retries, mps=True)
        for name, retries in zip("abcd", (0, 1, 0, 0), strict=True)
    ]
    killed, retried, waits, removed = runs
    for run in (killed, retried, removed):
        tell(run, "await 12")
    broken = made(study, "broken")
    pack, job = submitted("local", [*runs, broken])
    broken.config_file.write_text("{")
    wait_for_steps(pack, killed, retried)
    shown = flowjobs("status", "c").stdout
    assert f"c waits for a slot of job {job.job_id}" in shown
    # For a while nothing can be said of two of them: as a file server that fails over has it.
    for run in (killed, waits):
        run.cancel_file.symlink_to(run.cancel_file)
    wait_for_log(pack, f"'{killed.cancel_file}'")
    for run in (killed, retried):
        pid = status_of(run).attempts[-1].job.pid
        variables = Path(f"/proc/{pid}/environ").read_text()
        mps = re.search(r"CUDA_MPS_PIPE_DIRECTORY=([^\0]+)", variables)
        os.kill(pid, signal.SIGKILL)
        tell(run, "")
    wait_for_log(pack, "c does not start now")
    wait_for_log(pack, "how it ended is not written down yet")
    for run in (killed, waits):
        run.cancel_file.unlink()
    wait_for_steps(pack, removed)
    removed.folder.rename(study / "removed")
    tell(removed, "")
    wait_for_end(pack, job)
    assert attempts_of(killed) == [("failed", "killed")], explain(pack)()
    assert status_of(killed).reason.startswith("killed (SIGKILL) on")
    assert attempts_of(retried) == [("preempted", "killed"), ("finished", "")]
    for run in (retried, waits):
        assert_equal_to(whole, run)
    assert attempts_of(waits) == [("finished", "")]
    wait_for_log(pack, "d was removed")
    assert pack.remaining(job.job_id) == [broken]  # a person restores its config, and submits it
    assert status_of(broken).attempts == []
    assert mps
    calls = Path(f"{control}.calls").read_text().split()
    assert calls == ["-d", mps[1], "quit", "-t", "5", mps[1]]
    assert not Path(mps[1]).exists()


def test_a_sweep_whose_runs_share_a_job_is_requeued_once_and_each_run_ends_in_its_own_way(
    study: Path, whole: Run, slurm: SlurmCluster, flowjobs: Command
) -> None:
    for letter in "abcd":
        Path(letter).write_text("await 12")
    several = ("--runs-per-gpu", "2", "--parallel", "2", "--name", "shared")
    done = flowjobs(
        *("sweep", "--arch", "tests.jobs.slow_model:SlowModel", "--flow", "icfm", "--epochs", "4"),
        *("--batch-size", "128", "--wandb-mode", "offline", *several),
        *("--arch-args", "control=a", "control=b", "control=c", "control=d"),
        *("--partition", "preempt", "--sbatch", "nodelist=n1", "--cpus-per-task", "4"),
    )
    asks = "1 job x 1 GPU, as long as the partition allows; 4 runs share them, 2 at once, 2 of 4"
    assert asks in done.stdout, done.stdout + done.stderr
    runs = [Run.at(folder) for folder in sorted((study / "runs").iterdir())]
    first, cancelled, killed, last = runs
    (job_id,) = {run.submissions()[-1].job_id for run in runs}
    pack = pack_of(first, job_id)
    assert pack is not None
    wait_for_steps(pack, first, cancelled)

    said = flowjobs("cancel", cancelled.name).stdout
    assert f"cancelled its place in job {job_id}" in said
    wait_for_steps(pack, killed)  # in the slot that is free then
    assert attempts_of(cancelled) == [("cancelled", "cancelled")]

    os.kill(status_of(killed).attempts[-1].job.pid, signal.SIGKILL)
    wait_for_steps(pack, last)
    assert attempts_of(killed) == [("failed", "killed")]
    assert running_job(killed) is None  # it may be submitted again, though the job lives
    assert str(running_job(first)) == f"job {job_id} (running)"

    disturbed = Disturbed(first, job_id, slurm)
    preempt_and_wait(disturbed)
    for run in (first, last):
        disturbed.hurry_while(lambda run=run: run.finished())
        assert attempts_of(run) == [("preempted", "preempted"), ("finished", "")]
        assert_equal_to(whole, run)
    slurm.wait_state(job_id, "FAILED")  # as one of its runs has
    assert pack.starts_of(job_id) == 2
    for run in runs:
        assert [entry.job_id for entry in run.submissions()] == [job_id]
    assert len(attempts_of(cancelled)) == len(attempts_of(killed)) == 1


def test_a_job_that_waits_is_cancelled_with_the_last_of_its_runs(
    study: Path, slurm: SlurmCluster, flowjobs: Command
) -> None:
    options = ("--wandb-mode", "disabled", "--sbatch", "hold=True", "--name", "shared")
    done = flowjobs("sweep", "--seed", "0", "1", "2", "--runs-per-gpu", "3", *options)
    assert done.returncode == 0, done.stderr
    assert "waiting    3" in flowjobs("sweep", "shared", "--dry-run").stdout
    assert "cancelled its place in job" in flowjobs("cancel", "seed=0").stdout
    # Without its folder the runs still know whose job it is, and that one of them wants it.
    shutil.rmtree(study / "packs")
    assert "pack.json cannot be read" in flowjobs("sweep", "shared", "--parallel", "3").stderr
    assert "cancelled its place in job" in flowjobs("cancel", "seed=1").stdout
    assert "PENDING" in slurm.run("squeue", "-h", "-o", "%T")
    # Where nothing can be written any more, the job is ended all the same.
    full = 'ulimit -f 0; exec "$0" -m flowjobs cancel shared'
    command = ["sh", "-c", full, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("cancelled job") == 3, done.stdout + done.stderr
    assert done.stderr.count("could not be noted as cancelled ([Errno 27] File too large") == 3
    plan = ("sweep", "shared", "--dry-run")
    wait_until(lambda: "cancelled  3" in flowjobs(*plan).stdout, "Slurm to know it", DEADLINE_S)
    assert slurm.run("squeue", "-h") == ""


@pytest.mark.long
def test_a_job_that_dies_itself_is_started_again_for_all_of_them(
    study: Path, whole: Run, slurm: SlurmCluster
) -> None:
    runs = [made(study, name, retries=1) for name in "abc"]
    for run in runs[:2]:
        tell(run, "await 12")
    pack, job = submitted("slurm", runs)
    wait_for_steps(pack, *runs[:2])
    (process,) = {parent_of(status_of(run).attempts[-1].job.pid) for run in runs[:2]}
    os.kill(process, signal.SIGKILL)
    for run in runs[:2]:
        tell(run, "")
    disturbed = Disturbed(runs[0], job.job_id, slurm)
    for run in runs:
        disturbed.hurry_while(lambda run=run: run.finished())
        assert_equal_to(whole, run)
    assert [attempts_of(run) for run in runs] == [
        *([("preempted", "killed"), ("finished", "")],) * 2,
        [("finished", "")],
    ]
    assert pack.starts_of(job.job_id) == 2
    first, second = status_of(runs[0]).attempts
    assert first.job.host != second.job.host


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_run_that_was_removed_keeps_no_other_of_its_pack_from_being_noted(study: Path) -> None:
    removed, other = (ended(study, name, Outcome("failed", 1)) for name in "ab")
    pack = new_pack(study, "shared", [removed, other], 1, other.asked())
    shutil.rmtree(removed.folder)
    pack.add_submission("9", "slurm", None)
    assert other.submission("9")
    assert pack.submissions()[-1].job_id == "9"
    assert not removed.folder.exists()


def test_each_run_that_the_kernel_kills_for_memory_at_once_is_told_from_one_that_was_killed(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_has_killed = 0
    monkeypatch.setattr(packing, "memory_kills", lambda: kernel_has_killed)
    runs = [made(study, name) for name in "abc"]
    job = JobInfo("local", "7", None, "n1", 1)
    slots = packing._Slots(new_pack(study, "shared", runs, 3, runs[0].asked()), job)
    dead = {run: subprocess.Popen(["sh", "-c", "kill -9 $$"]) for run in runs}
    for run, process in dead.items():
        process.wait()
        own = replace(job, pid=process.pid, log=str(run.output_of(job.job_id)))
        attempt = AttemptRecord(1, own, started=now())
        RunStatus("running", attempts=[attempt]).write(run.status_file)
    kernel_has_killed = 2
    # The first one's end is written down at the second try: it is one of them all the same.
    first = runs[0]
    first.cancel_file.symlink_to(first.cancel_file)
    slots._running |= {run: packing._Process(dead[run]) for run in runs}
    slots._note_ended(again=True)
    assert [*slots._running] == [first]
    first.cancel_file.unlink()
    slots._note_ended(again=False)
    kinds = ["out of memory", "out of memory", "killed"]
    assert [attempts_of(run) for run in runs] == [[("failed", kind)] for kind in kinds]


def test_a_job_that_could_not_even_begin_is_started_again_for_its_runs(
    slurm: SlurmCluster, study: Path
) -> None:
    pack = new_pack(study, "shared", [made(study, "a"), made(study, "b")], 2, SlurmConfig())
    job_id = slurm.submit("--output=/dev/null", "--wrap", "sleep 600")
    pack.add_submission(job_id, "slurm", None)
    slurm.wait_state(job_id, "RUNNING")
    job = JobInfo("slurm", job_id, None, "n1", 1)
    pack.note_start(job_id)
    assert handle_pack_end(pack, job, 75) == {}  # that one has begun, and left in good order
    assert slurm.job(job_id)["Restarts"] == "0"
    pack.starts_file.unlink()
    assert handle_pack_end(pack, job, 75) == {}
    assert slurm.job(job_id)["Restarts"] == "1"
    assert [run.status().state for run in pack.runs] == ["submitted", "submitted"]
