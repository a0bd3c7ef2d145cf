"""Rows of interruptions.md as a W&B server sees them, while they happen and afterwards."""

import signal

import pytest

from flowjobs.runs.metrics import read_rows
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.jobs.disturbed import DEADLINE_S, OPTIONS, Disturbed, Start, tell_if_late
from tests.tracking.backend import Backend, RunOnServer
from tests.tracking.conftest import backend
from tests.tracking.history import on_server, without_picture

__all__ = ["backend"]

ONLINE = ("--wandb-mode", "online")


def wait_for_state(job: Disturbed, backend: Backend, state: str) -> RunOnServer:
    """The run on the server, once it is in this state."""

    def says_so() -> bool:
        tell_if_late(job.run)
        return on_server(job.run, backend).state == state

    said = f"W&B to say {state}"
    wait_until(says_so, said, DEADLINE_S, lambda: str(on_server(job.run, backend)))
    return on_server(job.run, backend)


def assert_finished(job: Disturbed, backend: Backend) -> None:
    job.wait_for_state("finished")
    found = wait_for_state(job, backend, "finished")
    assert (found.exit_code, found.tags) == (0, ["flowjobs"])
    assert without_picture(found.rows) == list(read_rows(job.run.metrics_file))


@pytest.mark.long
def test_a_preempted_run_waits_and_has_not_failed(start: Start, backend: Backend) -> None:
    job = start(*ONLINE, "--partition", "preempt", "--sbatch", "nodelist=n1")
    assert on_server(job.run, backend).state == "running"
    other = job.slurm.preempt("n1")
    job.wait_for_state("preempted")
    found = wait_for_state(job, backend, "preempted")
    assert found.tags == ["flowjobs"]
    assert "preempted (SIGUSR2)" in found.notes
    job.slurm.run("scancel", other)
    assert_finished(job, backend)


def test_a_killed_run_has_failed_until_it_recovers(
    start: Start, backend: Backend, flowjobs: Command
) -> None:
    job = start(*ONLINE)
    job.kill(signal.SIGKILL)
    found = wait_for_state(job, backend, "failed")
    assert (found.exit_code, found.tags) == (137, ["flowjobs", "failed"])
    assert "killed (SIGKILL) on n1, attempt 1, step" in found.notes
    assert f"log: {job.run.logs}" in found.notes
    job.slurm.wait_state(job.job_id, "FAILED")
    done = flowjobs("submit", *OPTIONS, *ONLINE, "--name", "disturbed")
    assert done.returncode == 0, done.stderr
    assert_finished(job, backend)


def test_an_exception_is_there_with_its_traceback(start: Start, backend: Backend) -> None:
    job = start(*ONLINE)
    job.tell("raise")
    found = wait_for_state(job, backend, "failed")
    assert (found.exit_code, found.tags) == (1, ["flowjobs", "failed"])
    assert "> ValueError: the model was told to fail" in found.notes


def test_a_cancelled_run_has_not_failed(start: Start, backend: Backend) -> None:
    job = start(*ONLINE)
    job.slurm.run("scancel", job.job_id)
    job.wait_for_state("cancelled")
    found = wait_for_state(job, backend, "preempted")
    assert found.tags == ["flowjobs", "cancelled"]
    assert "cancelled by scancel" in found.notes


@pytest.mark.long
def test_a_run_whose_process_was_requeued_silently_is_one_run(
    start: Start, backend: Backend
) -> None:
    job = start(*ONLINE, "--checkpoint-every-s", "1", "--sbatch", "nodelist=n1")
    job.slurm.kill_node("n1")
    job.tell("")
    job.slurm.mark_down("n1")
    job.slurm.start_node("n1")
    assert_finished(job, backend)
    assert len(backend.runs()) == 1
