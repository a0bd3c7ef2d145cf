"""What W&B says of attempts that could not say it themselves, after `close_session`."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flowjobs.cli.defaults import load_defaults
from flowjobs.config import RunConfig, TrackingConfig
from flowjobs.jobs.cancel import cancel
from flowjobs.jobs.reconcile import reconcile
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, RunStatus, now
from flowjobs.tracking.process import close_session, pending_outcome
from flowjobs.tracking.record import read_session
from flowjobs.tracking.sync import sync_run
from tests.cluster.waiting import wait_until
from tests.tracking import attempts
from tests.tracking.backend import Backend
from tests.tracking.conftest import MakeRun
from tests.tracking.history import (
    assert_history_is_exact,
    finish_and_tell,
    on_server,
    run_to_the_end,
    wait_until_open,
    write_end,
)
from tests.tracking.leet import Inspected, inspect, records, session_files

OUT_OF_MEMORY = Outcome("failed", 137, "out of memory: 61.2 of 60 GiB on n3, attempt 1, step 400")
CANCELLED = Outcome("cancelled", 130, "cancelled by its user")


def attempt_that_is_killed(run: Run) -> None:
    attempts.hold(run, 500)
    process = attempts.start(run, 5000, pace_s=0.02)
    everybody = [*attempts.mirror_and_core(process.pid), process.pid]
    attempts.wait_for_rows(run, 45)
    if run.config().tracking.wandb_mode == "offline":
        wait_until_open(run, None)
    attempts.kill(*everybody)
    attempts.finish(process)
    attempts.let_go(run)


def attempt_that_never_reached_wandb(run: Run) -> None:
    status = RunStatus("running")
    job = JobInfo("slurm", "12", "/logs/12.out", "n3", 1)
    status.attempts.append(AttemptRecord(1, job, started=now()))
    status.write(run.status_file)


def state_of(run: Run, backend: Backend | None) -> tuple[str, int | None, list[str], str]:
    """State, exit code, tags and notes: on the server, or in the newest offline file."""
    if backend is not None:
        found = on_server(run, backend)
        return found.state, found.exit_code, found.tags, found.notes
    read: Inspected = inspect(session_files(run)[-1])
    return read.state, read.exit_code, read.tags, read.notes


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_silent_death_is_failed_with_its_reason(tracked_run: MakeRun, mode: str) -> None:
    run, backend = tracked_run(mode)
    attempt_that_is_killed(run)
    write_end(run, OUT_OF_MEMORY)
    assert close_session(run)
    state, exit_code, tags, notes = state_of(run, backend)
    assert (state, exit_code, tags) == ("failed", 137, ["flowjobs", "failed"])
    assert notes.startswith(f"flowjobs: failed: {OUT_OF_MEMORY.reason}\n> attempt 1, ")
    assert f"> log: {run.logs}" in notes
    assert_history_is_exact(run, backend)

    assert not close_session(run)
    run_to_the_end(run, 5000)
    state, exit_code, tags, notes = state_of(run, backend)
    assert (state, exit_code, tags) == ("finished", 0, ["flowjobs"])
    assert notes.startswith("flowjobs: finished\n")
    assert_history_is_exact(run, backend)
    assert not close_session(run)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_crash_before_wandb_started_is_there_with_its_identity(
    tracked_run: MakeRun, mode: str
) -> None:
    run, backend = tracked_run(mode)
    attempt_that_never_reached_wandb(run)
    write_end(run, Outcome("failed", 1, "ImportError: no module named torch"))
    assert close_session(run)
    state, exit_code, tags, notes = state_of(run, backend)
    assert (state, exit_code, tags) == ("failed", 1, ["flowjobs", "failed"])
    assert "> attempt 1, slurm job 12 on n3, step 0\n> log: /logs/12.out" in notes
    if backend is None:
        config = inspect(session_files(run)[-1]).config
    else:
        config = on_server(run, backend).config
    assert config["lr"] == 1e-3
    assert config["attempts"] == [{"attempt": 1, "cluster": "slurm", "job_id": "12", "host": "n3"}]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_telling_a_death_says_nothing_of_the_machine_that_tells_it(
    tracked_run: MakeRun, mode: str
) -> None:
    run, backend = tracked_run(mode)
    attempt_that_is_killed(run)
    surroundings = run.surroundings_file
    found = json.loads(surroundings.read_text())
    surroundings.write_text(json.dumps(found | {"host": "n3", "git_commit": "abc"}))
    write_end(run, OUT_OF_MEMORY)
    assert close_session(run)
    if backend is None:
        path = session_files(run)[-1]
        config = inspect(path).config
        assert not {"environment", "stats"} & {record["type"] for record in records(path)}
    else:
        config = on_server(run, backend).config
    assert (config["host"], config["git_commit"]) == ("n3", "abc")
    assert config["torch_version"] == found["torch_version"]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_that_is_cancelled_while_it_waits_is_not_failed(
    tracked_run: MakeRun, mode: str
) -> None:
    run, backend = tracked_run(mode)
    attempts.hold(run, 500)
    process = attempts.start(run, 5000, pace_s=0.02)
    attempts.wait_for_rows(run, 45)
    process.terminate()
    finish_and_tell(run, process, 75)
    assert state_of(run, backend)[0] == "preempted"
    assert not close_session(run)

    write_end(run, CANCELLED)
    assert close_session(run)
    state, exit_code, tags, notes = state_of(run, backend)
    assert (state, exit_code, tags) == ("preempted", 130, ["flowjobs", "cancelled"])
    assert notes.startswith("flowjobs: cancelled: cancelled by its user")
    assert_history_is_exact(run, backend)


def test_an_offline_file_that_is_only_a_header_does_not_hinder(tracked_run: MakeRun) -> None:
    run, _ = tracked_run("offline")
    attempt_that_is_killed(run)
    (file,) = session_files(run)
    file.write_bytes(file.read_bytes()[:7])
    write_end(run, OUT_OF_MEMORY)
    assert close_session(run)
    assert state_of(run, None)[0] == "failed"
    assert_history_is_exact(run, None)


def test_an_outcome_that_cannot_be_told_is_kept(
    tracked_run: MakeRun, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tracked_run("online")
    attempt_that_is_killed(run)
    backend.go_down()
    write_end(run, OUT_OF_MEMORY)
    assert close_session(run)
    assert pending_outcome(run) == OUT_OF_MEMORY
    backend.come_back()
    with monkeypatch.context() as cron:
        cron.delenv("WANDB_API_KEY")
        assert close_session(run)
    assert pending_outcome(run) == OUT_OF_MEMORY
    assert close_session(run)
    assert pending_outcome(run) is None
    assert on_server(run, backend).state == "failed"


def test_a_run_without_tracking_has_nothing_to_close(tracked_run: MakeRun) -> None:
    run, _ = tracked_run("disabled")
    attempt_that_never_reached_wandb(run)
    write_end(run, OUT_OF_MEMORY)
    assert not close_session(run)
    assert not run.tracking_file.exists()


def test_what_was_kept_out_of_wandb_stays_out_where_the_variable_is_not_set(
    study: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(study, "mine")
    with monkeypatch.context() as shell:
        shell.setenv("WANDB_MODE", "disabled")
        run.create(RunConfig(tracking=load_defaults().fill(TrackingConfig)))
    attempt_that_never_reached_wandb(run)
    write_end(run, Outcome("failed", 1, "ImportError: no module named einops"))
    assert pending_outcome(run) is None  # as cron sees it
    assert not close_session(run)
    monkeypatch.setenv("WANDB_MODE", "online")  # of another run
    assert not close_session(run)
    assert sync_run(run, ask=True).state == "untracked"
    assert (backend.runs(), run.tracking_file.exists()) == ([], False)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_that_is_cancelled_before_it_began_is_none_in_wandb(
    tracked_run: MakeRun, mode: str
) -> None:
    run, backend = tracked_run(mode)
    cancel(run)
    assert pending_outcome(run) is None
    assert reconcile([run]) == []
    assert (session_files(run) if backend is None else backend.runs()) == []


def test_closing_loads_neither_torch_nor_wandb(tmp_path: Path) -> None:
    code = "import sys, flowjobs.tracking.process\nprint({'torch', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_telling_a_death_beside_an_attempt_that_starts_does_not_end_that(
    tracked_run: MakeRun, mode: str
) -> None:
    run, backend = tracked_run(mode)
    attempt_that_is_killed(run)
    write_end(run, OUT_OF_MEMORY)
    before = read_session(run)
    with ThreadPoolExecutor() as beside:
        telling = beside.submit(close_session, run)
        wait_until(lambda: read_session(run) != before, "it to begin", 600)
        run_to_the_end(run, 5000)
        telling.result()
    state, exit_code, tags, _ = state_of(run, backend)
    assert (state, exit_code, tags) == ("finished", 0, ["flowjobs"])
    assert_history_is_exact(run, backend)
    assert pending_outcome(run) is None


def test_an_outcome_that_is_only_on_disk_is_still_to_be_told(tracked_run: MakeRun) -> None:
    run, _ = tracked_run("offline")
    attempt_that_is_killed(run)
    assert pending_outcome(run) is None  # nobody knows yet how it ended
    write_end(run, OUT_OF_MEMORY)
    assert pending_outcome(run) == OUT_OF_MEMORY
    assert close_session(run)
    assert pending_outcome(run) is None
