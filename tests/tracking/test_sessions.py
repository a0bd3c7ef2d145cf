"""One W&B run over several attempts: each step once, as in `metrics.jsonl`, and what a person said.

The real client, against a server on this machine and offline.
"""

import contextlib
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.tracking.record import begin_session, read_session
from flowjobs.tracking.tracker import WandbTracker
from tests.cluster.waiting import wait_until
from tests.tracking import attempts
from tests.tracking.backend import Backend
from tests.tracking.conftest import MakeRun
from tests.tracking.history import (
    assert_history_is_exact,
    finish_and_tell,
    has_picture,
    on_server,
    run_to_the_end,
    wait_until_open,
    without_picture,
)
from tests.tracking.leet import offline_rows


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_one_run_over_three_attempts_has_every_step_once(tracked_run: MakeRun, mode: str) -> None:
    run, backend = tracked_run(mode)
    attempts.hold(run, 500)
    first = attempts.start(run, 1000, pace_s=0.02)
    attempts.wait_for_rows(run, 30)
    first.terminate()
    assert attempts.finish(first)[0] == 75

    attempts.hold(run, 900)
    second = attempts.start(run, 1000, pace_s=0.02)
    attempts.wait_for_rows(run, 60)
    attempts.kill(*attempts.mirror_and_core(second.pid), second.pid)
    attempts.finish(second)
    attempts.let_go(run)

    run_to_the_end(run, 1000)
    assert_history_is_exact(run, backend)
    if backend is not None:
        found = on_server(run, backend)
        assert (found.state, found.exit_code) == ("finished", 0)
        assert found.summary["train/loss"] == {"min": attempts.row_at(1000)["train/loss"]}
        assert found.summary["final_epoch"] == 9
        assert len(found.config["attempts"]) == 3


def killed(run: Run, chance: random.Random, *, in_wandb: bool) -> None:
    """An attempt whose processes are killed, some or all of them, a few rows after its start."""
    before = len(run.status().attempts)
    process = attempts.start(run, 10**6, pace_s=0.005)
    wait_until(lambda: len(run.status().attempts) > before, "it to begin", 600)
    if in_wandb:
        attempts.mirror_and_core(process.pid)
    rows = len(list(read_rows(run.metrics_file)))
    attempts.wait_for_rows(run, rows + chance.randrange(1, 60))
    mirror = attempts.children(process.pid)
    core = [pid for parent in mirror for pid in attempts.children(parent)]
    # The whole job, as Slurm does it; python alone; all but python.
    victims = chance.choice([[*core, *mirror, process.pid], [process.pid], [*core, *mirror]])
    attempts.kill(*victims)
    if process.pid not in victims:
        time.sleep(chance.uniform(0, 0.3))
        attempts.kill(process.pid)
    attempts.finish(process)


def killed_many_times(run: Run, backend: Backend | None, kills: int) -> None:
    chance = random.Random(4)
    for number in range(kills):
        killed(run, chance, in_wandb=number % 2 == 1)  # the others most often before wandb starts
    *_, last = read_rows(run.metrics_file)
    run_to_the_end(run, last["step"] + 500)
    assert_history_is_exact(run, backend)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_six_kills_lose_and_double_nothing(tracked_run: MakeRun, mode: str) -> None:
    killed_many_times(*tracked_run(mode), kills=6)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_fifty_kills_lose_and_double_nothing(tracked_run: MakeRun, mode: str) -> None:
    killed_many_times(*tracked_run(mode), kills=50)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_signal_to_all_processes_of_the_job_ends_it_preempted(
    tracked_run: MakeRun, mode: str
) -> None:
    run, backend = tracked_run(mode)
    attempts.hold(run, 500)
    process = attempts.start(run, 10_000, pace_s=0.02)
    everybody = [*attempts.mirror_and_core(process.pid), process.pid]
    wait_until_open(run, backend)
    attempts.kill(*everybody, with_signal=signal.SIGUSR2)
    attempts.kill(*everybody, with_signal=signal.SIGTERM)
    finish_and_tell(run, process, 75)
    assert_history_is_exact(run, backend)
    if backend is not None:
        assert on_server(run, backend).state == "preempted"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_dying_alone_costs_no_row(tracked_run: MakeRun, mode: str) -> None:
    run, backend = tracked_run(mode)
    process = attempts.start(run, 10**6, pace_s=0.02)
    _, core = attempts.mirror_and_core(process.pid)
    attempts.wait_for_rows(run, 40)
    attempts.kill(core)
    assert process.stderr is not None
    said = ""
    while "W&B answers again" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.terminate()
    finish_and_tell(run, process, 75)
    assert_history_is_exact(run, backend)
    assert said.count("W&B cannot be told now") == 1


def test_what_a_person_wrote_stays_and_recovery_clears_the_failure(
    tracked_run: MakeRun, backend: Backend
) -> None:
    run, _ = tracked_run("online")
    (run.folder / "step").mkdir()
    finish_and_tell(run, attempts.start(run, 100), 1)
    found = on_server(run, backend)
    assert (found.state, found.exit_code) == ("failed", 1)
    backend.edit(found.id, tags=[*found.tags, "mine"], notes=f"{found.notes}\n\nlook at this")

    (run.folder / "step").rmdir()
    run_to_the_end(run, 100)
    found = on_server(run, backend)
    assert found.state == "finished"
    assert found.tags == ["mine", "flowjobs"]
    assert found.notes.startswith("flowjobs: finished\n> attempt 2")
    assert found.notes.endswith("\n\nlook at this")


def test_what_a_person_writes_while_the_run_trains_stays(
    tracked_run: MakeRun, backend: Backend
) -> None:
    run, _ = tracked_run("online")
    attempts.hold(run, 400)
    process = attempts.start(run, 500, pace_s=0.05)
    attempts.wait_for_rows(run, 20)
    wait_until_open(run, backend)
    # Its tags and notes come after its first word, in place of what is there.
    wait_until(lambda: on_server(run, backend).notes.startswith("flowjobs"), "its notes", 600)
    found = on_server(run, backend)
    backend.edit(found.id, tags=[*found.tags, "mine"], notes=f"{found.notes}\n\nlook at this")
    attempts.let_go(run)
    finish_and_tell(run, process)
    found = on_server(run, backend)
    assert found.tags == ["mine", "flowjobs"]
    assert found.notes.endswith("\n\nlook at this")


def test_the_rows_are_in_an_offline_file_while_the_run_trains(
    tracked_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tracked_run("offline")

    def all_told() -> bool:
        # A file that is being written may end in half a record.
        with contextlib.suppress(subprocess.CalledProcessError):
            return offline_rows(run) == list(read_rows(run.metrics_file))
        return False

    monkeypatch.setenv("PICTURE_AFTER_S", "3600")
    process = attempts.start(run, 2010)  # the last row ends no epoch, so it is told at once
    mirror_and_core = attempts.mirror_and_core(process.pid)
    attempts.wait_for_rows(run, 201)
    wait_until(all_told, "all rows to be in the file", 600)
    attempts.kill(process.pid, *mirror_and_core)
    attempts.finish(process)
    assert all_told()


def test_the_last_row_of_a_run_that_is_killed_at_its_picture_is_there(
    tracked_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tracked_run("offline")
    monkeypatch.setenv("PICTURE_AFTER_S", "3600")
    process = attempts.start(run, 200, pace_s=0.1)
    mirror, _ = attempts.mirror_and_core(process.pid)
    attempts.wait_for_rows(run, 20)
    attempts.kill(process.pid)
    attempts.finish(process)
    deadline = time.monotonic() + 600
    while Path(f"/proc/{mirror}").exists():
        assert time.monotonic() < deadline, "the mirror goes on without its parent"
        time.sleep(0.05)
    assert offline_rows(run) == list(read_rows(run.metrics_file))


@pytest.mark.parametrize("mode", [pytest.param("online", marks=pytest.mark.long), "offline"])
def test_where_repeated_rows_differ_wandb_says_from_which_step_on(
    tracked_run: MakeRun, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, backend = tracked_run(mode)
    monkeypatch.setenv("NO_CHECKPOINT", "1")
    process = attempts.start(run, 10**6, pace_s=0.02)
    everybody = [*attempts.mirror_and_core(process.pid), process.pid]
    wait_until_open(run, backend)
    while backend is not None and len(on_server(run, backend).rows) < 4:
        time.sleep(0.05)
    attempts.kill(*everybody)
    attempts.finish(process)
    lost = list(read_rows(run.metrics_file))

    monkeypatch.setenv("OTHER_BITS_PAST", "20")  # as on another type of GPU
    said = run_to_the_end(run, lost[-1]["step"] + 500)
    assert "step 30 was repeated with other values" in said
    rows = list(read_rows(run.metrics_file))
    assert rows[2] != lost[2]
    if backend is None:
        # The file of the attempt that was killed does not count: W&B has the rows that do.
        assert without_picture(offline_rows(run)) == rows
        return
    found = on_server(run, backend)
    kept = [row for row in lost if row in found.rows]
    assert len(kept) > 2
    assert without_picture(found.rows) == kept + rows[len(kept) :]
    assert "> past step 20 work was lost and repeated with other values" in found.notes
    assert run.status().diverged_after == 20


def test_a_trainer_that_was_taken_over_does_not_take_the_run_back(tracked_run: MakeRun) -> None:
    run, _ = tracked_run("online")
    tracker = WandbTracker(run, "online")
    assert tracker._mirror is not None
    with tracker._mirror:
        newest = begin_session(run, "online")
        tracker.finish()
        assert read_session(run) == newest


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_the_picture_is_in_the_last_row_and_nowhere_else(
    tracked_run: MakeRun, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, backend = tracked_run(mode)
    monkeypatch.setenv("PICTURE_AFTER_S", "2")  # drawing it takes a while
    attempts.hold(run, 400)
    process = attempts.start(run, 500, pace_s=0.02)
    attempts.wait_for_rows(run, 20)
    process.terminate()
    attempts.finish(process)
    attempts.let_go(run)
    run_to_the_end(run, 500)
    # Its process died before it could note that the run is finished, so another one does it all.
    run_to_the_end(run, 500)
    assert_history_is_exact(run, backend)
    rows = offline_rows(run) if backend is None else on_server(run, backend).rows
    assert [row["step"] for row in rows if has_picture(row)] == [500]
    if backend is not None:
        pictures = [name for name in on_server(run, backend).files if "media/images" in name]
        assert len(pictures) == 1
