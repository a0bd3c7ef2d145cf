"""Budgets that look at progress: when a run is started once more."""

from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.config import RestartConfig, RunConfig
from flowjobs.errors import NoProgressError, RunInterrupted
from flowjobs.runs.attempt import Attempt
from flowjobs.runs.restarts import attempts_without_progress, may_retry
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo

JOB = JobInfo("slurm", "12", None, "n1", 1)


def attempt(
    number: int, first: int | None, last: int | None, kind: str = "preempted", *, ended: bool = True
) -> AttemptRecord:
    job = replace(JOB, restart=number - 1)
    end = "then" if ended else None
    return AttemptRecord(number, job, "now", first, last, ended=end, kind=kind)


def test_attempts_that_train_a_step_cost_nothing() -> None:
    assert attempts_without_progress([attempt(n, 10 * n, 10 * n + 10) for n in range(1, 50)]) == 0


def test_attempts_without_a_step_are_counted_back_to_the_last_one_that_had_some() -> None:
    attempts = [attempt(1, 0, 30), attempt(2, 30, 30), attempt(3, None, None), attempt(4, 30, 30)]
    assert attempts_without_progress(attempts) == 3


def test_steps_that_were_lost_do_not_count() -> None:
    # Killed before anything could be saved: each starts where the one before it did.
    attempts = [attempt(n, 0, 40) for n in range(1, 5)]
    asking = attempt(5, 0, 0, ended=False)
    assert attempts_without_progress([*attempts, asking]) == 4
    assert attempts_without_progress([*attempts, attempt(5, 20, 20, ended=False)]) == 0


def test_what_was_prepared_before_the_first_step_is_progress() -> None:
    attempts = [replace(attempt(n, None, None), prepared=n) for n in range(1, 5)]
    assert attempts_without_progress([*attempts, attempt(5, None, None, ended=False)]) == 0
    assert attempts_without_progress([*attempts, attempt(5, None, None)]) == 1


def test_a_person_begins_the_count_anew() -> None:
    attempts = [attempt(n, 0, 0) for n in (1, 2, 3)]
    by_person = AttemptRecord(4, replace(JOB, job_id="13"), "now", 0, 0, ended="then")
    assert attempts_without_progress([*attempts, by_person]) == 1


def retried(kind: str, *before: AttemptRecord, retries: int, last_step: int = 10) -> bool:
    this = attempt(len(before) + 1, 0, last_step, ended=False)
    return may_retry([*before, this], kind, RestartConfig(retries=retries))


def test_only_deaths_that_may_pass_are_retried_and_only_so_often() -> None:
    first = attempt(1, 0, 5, "out of memory")
    assert retried("out of memory", retries=1)
    assert not retried("out of memory", retries=0)
    assert not retried("exception", retries=5)
    assert not retried("segmentation fault", retries=5)
    assert not retried("node failure", first, retries=1)
    assert retried("node failure", first, retries=2)


def test_a_death_that_comes_back_at_the_same_step_is_not_retried() -> None:
    first = attempt(1, 0, 10, "out of memory")
    assert not retried("out of memory", first, retries=5)
    assert retried("out of memory", first, retries=5, last_step=11)


def test_what_it_died_of_before_its_user_started_it_again_spends_no_retry() -> None:
    first = attempt(1, 0, 10, "out of memory")
    by_user = AttemptRecord(2, replace(JOB, job_id="13"), "now", 0, 10)
    assert may_retry([first, by_user], "out of memory", RestartConfig(retries=1))


def test_without_a_gpu_before_its_first_step_a_run_is_retried_as_if_it_had_not_been_launched() -> (
    None
):
    tries = [attempt(n, None, None, "lost GPU") for n in range(1, 5)]
    none = RestartConfig(retries=0, give_up_after=5)
    assert may_retry([*tries[:3], replace(tries[3], ended=None)], "lost GPU", none)
    assert not may_retry([*tries, attempt(5, None, None, ended=False)], "lost GPU", none)
    # Once it has computed there the GPU was whole; and no other node is there for the others.
    assert not retried("lost GPU", retries=0)
    for elsewhere in (replace(JOB, cluster="local"), replace(JOB, packed=True)):
        assert not may_retry([AttemptRecord(1, elsewhere, "now")], "lost GPU", none)


def test_a_run_that_gets_nowhere_stops_with_the_reason(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig(restarts=RestartConfig(give_up_after=2)))

    def start(restart: int, job_id: str = "12") -> None:
        with Attempt(run, replace(JOB, job_id=job_id, restart=restart)) as started:
            started.start_at(0)
            raise RunInterrupted("preempted", 0)

    for restart in (0, 1):
        with pytest.raises(RunInterrupted):
            start(restart)
    for restart in (2, 3):  # Slurm may start it again all the same
        with pytest.raises(NoProgressError, match=r"ended without a new step.*preempted"):
            start(restart)
    status = run.status()
    assert (status.state, status.exit_code) == ("failed", 1)
    assert "2 attempts in a row" in status.attempts[2].reason
    with pytest.raises(RunInterrupted):  # a person may try again
        start(0, "13")
