"""The README's table, row by row, on the real Slurm: what happens to a job and what the run does.

Each test disturbs a job of one small run, waits for the run's end, and holds its weights, EMA and
metrics against those of the same run left in peace.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus
from flowjobs.training.checkpoint import read_checkpoint
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command

OPTIONS = (
    *("--arch", "tests.jobs.slow_model:SlowModel", "--flow", "icfm", "--epochs", "4"),
    *("--batch-size", "128", "--arch-args", "control=control"),
)
REPOSITORY = Path(__file__).parents[2]


@dataclass
class Disturbed:
    """A run whose job a test disturbs."""

    run: Run
    job_id: str
    slurm: SlurmCluster

    def tell(self, what: str) -> None:
        """What the model does in its next step; see SlowModel."""
        Path("control").write_text(what)

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal to the process that trains, as nothing else of the job sees it."""
        os.kill(self.status().attempts[-1].job.pid, number)

    def status(self) -> RunStatus:
        return self.run.status() or RunStatus()

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        def reached() -> bool:
            rows = list(read_rows(self.run.metrics_file))
            started = len(self.status().attempts) >= attempt
            return started and bool(rows) and rows[-1]["step"] >= step

        wait_until(reached, f"step {step} of attempt {attempt}", 60, self.explain)

    def wait_for_attempt(self, number: int) -> None:
        """Waits until the attempt trains, hurrying a job that waits for its BeginTime."""
        self.hurry_while(lambda: len(self.status().attempts) >= number)

    def wait_for_state(self, *states: str) -> RunStatus:
        self.hurry_while(lambda: self.status().state in states)
        return self.status()

    def hurry_while(self, reached: Callable[[], bool], timeout_s: float = 90) -> None:
        end = time.monotonic() + timeout_s
        hurried_at = 0.0
        while not reached():
            assert time.monotonic() < end, self.explain()
            if time.monotonic() - hurried_at > 1:
                hurried_at = time.monotonic()
                self._hurry()
            time.sleep(0.1)

    def _hurry(self) -> None:
        for line in self.slurm.run("squeue", "-h", "-r", "-o", "%i|%T|%r").splitlines():
            job_id, state, reason = line.split("|")
            if (state, reason) == ("PENDING", "BeginTime"):
                self.slurm.run("scontrol", "update", f"jobid={job_id}", "starttime=now+1")

    def explain(self) -> str:
        queue = self.slurm.run("squeue", "-h", "-o", "%i %T %r %j")
        return f"{self.status()}\n{queue}\n{self.logs()}"

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run.logs.glob("*.out")))

    def job_ids(self) -> list[str]:
        """Of every job that was submitted for the run."""
        return [entry["job_id"] for entry in self.run.submissions()]

    def attempts(self) -> list[tuple[str, str]]:
        return [(attempt.state, attempt.kind) for attempt in self.status().attempts]

    def steps_lost(self) -> int:
        """Steps that were done and had to be done again."""
        attempts = self.status().attempts
        return sum(
            (before.last_step or 0) - (after.first_step or 0)
            for before, after in itertools.pairwise(attempts)
        )


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "flowjobs", "train", *OPTIONS, "--name", "whole"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "WANDB_MODE": "disabled",
    }
    subprocess.run(command, check=True, env=environment, cwd=folder, timeout=120)
    return Run(folder / "study", "whole")


Start = Callable[..., Disturbed]


@pytest.fixture
def start(
    slurm: SlurmCluster, flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> Start:
    """Submits the run and waits until it trains."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("WANDB_MODE", "offline")

    def start(*options: str, step: int = 10) -> Disturbed:
        done = flowjobs("submit", *OPTIONS, "--name", "disturbed", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        run = Run(study, "disturbed")
        disturbed = Disturbed(run, run.submissions()[-1]["job_id"], slurm)
        disturbed.wait_for_step(step)
        return disturbed

    return start


def assert_equal_to(whole: Run, run: Run) -> None:
    """Weights, EMA, optimizer and metrics are the same, to the last bit."""
    for mine, other in ((run.last, whole.last), (run.best, whole.best)):
        found, expected = read_checkpoint(mine), read_checkpoint(other)
        for part in ("model_state_dict", "ema_shadow"):
            assert all(
                torch.equal(found[part][key], value) for key, value in expected[part].items()
            )
        assert found["step"] == expected["step"]
        assert found["scheduler_state_dict"] == expected["scheduler_state_dict"]
    assert list(read_rows(run.metrics_file)) == list(read_rows(whole.metrics_file))


ON_N1 = ("--sbatch", "nodelist=n1")


def preempt_and_wait(job: Disturbed) -> None:
    """Gives the place of the job to another one, and back when it has left."""
    other = job.slurm.preempt("n1")
    job.wait_for_state("preempted")
    job.slurm.run("scancel", other)


def test_preempted_with_grace_and_user_signal(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt", *ON_N1)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert "SIGUSR2" in job.status().attempts[0].reason
    assert job.steps_lost() == 0
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)


def test_preempted_with_grace_and_term_only(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt", *ON_N1)
    job.slurm.set_user_signal(False)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert "SIGTERM" in job.status().attempts[0].reason
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_preempted_without_grace(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt-nograce", *ON_N1)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert [state for state, _ in job.attempts()] == ["preempted", "finished"]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_requeued_by_hand(start: Start, whole: Run) -> None:
    job = start()
    job.slurm.run("scontrol", "requeue", job.job_id)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "requeued"), ("finished", "")]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_a_signal_by_hand_is_not_taken_for_a_time_limit(start: Start, whole: Run) -> None:
    job = start()
    job.slurm.run("scancel", "--signal=USR2", f"{job.job_id}.0")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "told to leave"), ("finished", "")]
    assert job.steps_lost() == 0
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)


def test_the_time_limit_costs_nothing(start: Start, whole: Run) -> None:
    job = start("--timeout-min", "1")
    job.tell("slow")
    job.wait_for_state("preempted")
    job.tell("")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "time limit"), ("finished", "")]
    assert job.steps_lost() == 0
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)


def test_killed_by_sigkill_it_fails_and_goes_on_when_asked(
    start: Start, flowjobs: Command, whole: Run
) -> None:
    job = start()
    job.kill(signal.SIGKILL)
    job.wait_for_state("failed")
    assert job.attempts() == [("failed", "killed")]
    assert "killed (SIGKILL) on n1, attempt 1, step" in job.status().reason
    assert job.slurm.wait_state(job.job_id, {"FAILED", "PENDING"}) == "FAILED"
    assert flowjobs("submit", *OPTIONS, "--name", "disturbed").returncode == 0
    job.wait_for_state("finished")
    assert_equal_to(whole, job.run)


def test_killed_by_sigkill_it_is_retried_on_another_node(start: Start, whole: Run) -> None:
    job = start("--retries", "1")
    job.kill(signal.SIGKILL)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "killed"), ("finished", "")]
    first, second = job.status().attempts
    assert first.job.host != second.job.host
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)


def test_a_segmentation_fault_fails(start: Start) -> None:
    job = start("--retries", "1")
    job.kill(signal.SIGSEGV)
    status = job.wait_for_state("failed")
    assert job.attempts() == [("failed", "segmentation fault")]
    assert status.exit_code == 139
    assert job.slurm.wait_state(job.job_id, {"FAILED", "PENDING"}) == "FAILED"


def test_out_of_memory_is_named_with_its_figures(start: Start) -> None:
    job = start("--mem-gb", "2")
    job.tell("memory")
    status = job.wait_for_state("failed")
    assert job.attempts() == [("failed", "out of memory")]
    assert re.match(r"out of memory: \d\.\d+ of 2 GiB on n1, attempt 1, step \d+", status.reason)


def test_an_exception_fails_and_is_not_repeated(start: Start) -> None:
    job = start("--retries", "3")
    job.tell("raise")
    status = job.wait_for_state("failed")
    assert status.reason == "ValueError: the model was told to fail"
    assert status.exit_code == 1
    assert job.slurm.wait_state(job.job_id, {"FAILED", "PENDING"}) == "FAILED"
    assert len(job.attempts()) == 1


def test_a_file_system_error_is_retried_but_not_at_the_same_step(start: Start) -> None:
    job = start("--retries", "3")
    job.tell("file system")
    job.wait_for_state("failed")
    # The second time it comes at the step of the first: it is no passing one.
    assert job.attempts() == [("preempted", "file system"), ("failed", "exception")]


def test_a_lost_node_loses_only_what_was_not_saved(start: Start, whole: Run) -> None:
    job = start(*ON_N1, "--checkpoint-every-s", "1")
    job.slurm.kill_node("n1")
    job.slurm.mark_down("n1")
    job.slurm.start_node("n1")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "node failure"), ("finished", "")]
    assert_equal_to(whole, job.run)


def test_a_process_that_lives_on_beside_its_rerun_writes_nothing_more(
    start: Start, whole: Run
) -> None:
    job = start()
    (first,) = job.status().attempts
    job.slurm.kill_slurmd(first.job.host)
    job.slurm.mark_down(first.job.host)
    job.tell("hold")  # so that both are alive at once
    job.wait_for_attempt(2)
    second = job.status().attempts[-1]
    assert second.job.host != first.job.host
    os.kill(first.job.pid, 0)  # it lives on
    job.tell("")
    job.wait_for_state("finished")
    wait_until(lambda: not alive(first.job.pid), "the first process to give up", 30)
    assert job.attempts() == [("preempted", "node failure"), ("finished", "")]
    assert_equal_to(whole, job.run)
    job.slurm.start_node(first.job.host)


def test_a_restart_of_the_controller_is_not_noticed(start: Start, whole: Run) -> None:
    job = start()
    job.slurm.restart_controller()
    job.wait_for_state("finished")
    assert job.attempts() == [("finished", "")]
    assert_equal_to(whole, job.run)


def test_a_controller_that_is_away_is_waited_for(start: Start, whole: Run) -> None:
    job = start()
    job.slurm.stop_controller()
    job.kill(signal.SIGUSR2)
    wait_until(lambda: job.status().state == "preempted", "the state to be saved", 60)
    time.sleep(2)
    job.slurm.start_controller()
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_scancel_ends_the_run_until_it_is_submitted_again(
    start: Start, flowjobs: Command, whole: Run
) -> None:
    job = start()
    job.slurm.run("scancel", job.job_id)
    job.wait_for_state("cancelled")
    assert job.slurm.wait_state(job.job_id, {"CANCELLED", "PENDING"}) == "CANCELLED"
    time.sleep(1)
    assert job.slurm.run("squeue", "-h") == ""
    assert flowjobs("submit", *OPTIONS, "--name", "disturbed").returncode == 0
    job.wait_for_state("finished")
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_flowjobs_cancel_ends_the_run_until_it_is_submitted_again(
    start: Start, flowjobs: Command, whole: Run
) -> None:
    job = start()
    done = flowjobs("cancel", "disturbed")
    assert done.returncode == 0, done.stderr
    assert f"cancelled job {job.job_id}" in done.stdout
    job.wait_for_state("cancelled")
    # Not even if Slurm is told to start the job again.
    job.slurm.wait_state(job.job_id, "CANCELLED")
    job.slurm.run("scontrol", "requeue", job.job_id)
    wait_until(lambda: "was cancelled: submit it again" in job.logs(), "the job to refuse", 60)
    assert job.status().state == "cancelled"
    assert flowjobs("submit", *OPTIONS, "--name", "disturbed").returncode == 0
    job.wait_for_state("finished")
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_where_the_partition_cancels_the_run_goes_on(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt-cancel", *ON_N1)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_where_requeuing_is_forbidden_the_run_goes_on_as_a_new_job(
    start: Start, whole: Run
) -> None:
    job = start("--partition", "preempt", "--sbatch", "nodelist=n1", "no-requeue=True")
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert job.steps_lost() == 0
    old, new = job.run.submissions()
    assert (old["job_id"], new["continues"]) == (job.job_id, job.job_id)
    assert_equal_to(whole, job.run)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
