"""`flowjobs sync`: the real client, a local server, and runs that ended in every way."""

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from flowjobs.cli import sync as cli_sync
from flowjobs.cli.main import run as run_command
from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig, WandbMode
from flowjobs.errors import RunInterrupted, TrackingError
from flowjobs.runs.attempt import Attempt
from flowjobs.runs.files import write_json
from flowjobs.runs.hint import hint, program
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo, RunStatus
from flowjobs.tracking.process import close_session, pending_outcome, start_mirror
from flowjobs.tracking.sync import sync_run
from tests.conftest import Command
from tests.tracking import attempts
from tests.tracking.backend import KEY, Backend, RunOnServer
from tests.tracking.driver import drive, row_of
from tests.tracking.history import is_quiet, tell, without_picture
from tests.tracking.leet import session_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(study: Path) -> Run:
    """A run that is tracked offline, not started yet."""
    return new_run(study, "tracked")


def new_run(study: Path, name: str, mode: WandbMode = "offline") -> Run:
    run = Run(study, name)
    run.create(RunConfig(TrainingConfig(group="flows"), tracking=TrackingConfig(wandb_mode=mode)))
    return run


def attempt(run: Run, steps: int, end: str = "finish", *, is_told: bool = True) -> None:
    """One attempt in this process, of which W&B is told unless it cannot be."""
    with contextlib.suppress(RunInterrupted, ValueError):
        drive(run, steps, end)
    if is_told:
        tell(run)


def start_attempt(run: Run, steps: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.tracking.driver", str(run.folder), str(steps)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


def rows_written(run: Run) -> int:
    return sum(1 for _ in read_rows(run.metrics_file))


def wait_for(condition: Callable[[], Any], timeout_s: float = 600) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def kill(process: "subprocess.Popen[Any]") -> None:
    """Kill a process, which may have ended."""
    process.kill()
    process.wait()


def killed_attempt(run: Run, steps: int, rows: int, *, in_wandb: bool = False) -> None:
    """An attempt that is killed when it has written so many rows more, and W&B's file if asked."""

    def folders() -> int:
        return len(list(run.folder.glob("wandb/offline-run-*")))

    before, folders_before = rows_written(run), folders()
    process = start_attempt(run, steps)
    wait_for(lambda: rows_written(run) >= before + rows)
    if in_wandb:
        wait_for(lambda: folders() > folders_before)
    kill(process)


def sync(run: Run, backend: Backend) -> RunOnServer:
    sync_run(run)
    return backend.run(run.tracking_id())


def assert_equal_histories(run: Run, there: RunOnServer) -> None:
    """Every row of the record is on the server, once, and none came twice."""
    assert without_picture(there.rows) == list(read_rows(run.metrics_file))
    assert len({row["_step"] for row in there.history}) == len(there.history)
    assert there.dropped == []


def test_a_finished_run_is_on_the_server_as_if_it_had_been_online(
    run: Run, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    attempt(run, 100)
    there = sync(run, backend)
    wait_for(lambda: not list(temporary.iterdir()))  # wandb's own process ends a moment later
    assert_equal_histories(run, there)
    assert [row["step"] for row in there.rows] == list(range(1, 101))
    assert (there.state, there.exit_code) == ("finished", 0)
    assert (there.group, there.name) == ("flows", "tracked")
    assert there.config["lr"] == run.config().training.lr
    assert (there.summary["final_epoch"], there.summary["best_val_loss"]) == (1, 1 / 50)
    assert there.summary["val/loss"]["min"] == 1 / 100
    assert there.summary["train/loss"]["min"] == 0


def test_a_second_sync_of_all_asks_nothing(run: Run, backend: Backend, flowjobs: Command) -> None:
    attempt(run, 50)
    sync(run, backend)
    backend.requests.clear()
    assert sync_run(run).state == "unchanged"
    assert backend.requests == []
    assert "unchanged since the last check" in flowjobs("sync").stdout
    assert backend.requests == []
    # By its name it is asked for: there it may have been deleted.
    assert flowjobs("sync", run.name).stdout == "tracked: all of it is on the server\n"
    assert "UpsertBucket" not in backend.requests
    assert backend.requests
    measures = {"mmd": {"value": 0.2, "floor": 0.1}}  # by `flowjobs evaluate`
    write_json(run.evaluation_file, {"n": 64, "step": 50, "measures": measures})
    summary = sync(run, backend).summary
    assert [summary[f"eval/{key}"] for key in ("n", "mmd", "mmd/floor")] == [64, 0.2, 0.1]
    assert sync_run(run).state == "unchanged"


def test_what_an_extended_run_came_to_before_is_gone_from_its_summary(
    run: Run, backend: Backend
) -> None:
    attempt(run, 50)
    write_json(run.evaluation_file, {"n": 64, "measures": {"mmd": {"value": 0.2, "floor": 0.1}}})
    assert {"eval/mmd", "final_epoch"} <= sync(run, backend).summary.keys()
    run.evaluation_file.unlink()
    attempt(run, 70, "preempt")
    there = sync(run, backend).summary
    assert there["epoch"] == 1
    assert not {"eval/mmd", "eval/n", "final_epoch", "checkpoint_path"} & there.keys()


def test_a_sync_elsewhere_that_finds_all_there_sends_nothing(run: Run, backend: Backend) -> None:
    attempt(run, 50)
    sync(run, backend)
    run.on_record_file.unlink()
    backend.requests.clear()
    assert sync_run(run).state == "complete"
    assert "UpsertBucket" not in backend.requests


def test_a_preempted_run_shows_as_preempted_and_goes_on(run: Run, backend: Backend) -> None:
    attempt(run, 70, "preempt")
    there = sync(run, backend)
    assert (there.state, "failed" in there.tags) == ("preempted", False)
    assert len(there.rows) == 70
    attempt(run, 150)
    there = sync(run, backend)
    assert there.state == "finished"
    assert_equal_histories(run, there)
    assert there.summary["train/loss"]["min"] == 0
    assert there.summary["val/loss"]["min"] == 1 / 150


def test_the_picture_of_a_finished_run_is_uploaded(run: Run, backend: Backend) -> None:
    Image.new("RGB", (4, 4)).save(run.samples_picture)
    attempt(run, 30)
    there = sync(run, backend)
    (shown,) = [row.pop("samples") for row in there.rows if "samples" in row]
    assert there.history[-1]["samples"] == shown
    assert there.files[shown["path"]] == run.samples_picture.read_bytes()
    assert there.summary["samples"] == shown


def test_files_that_cannot_be_uploaded_do_not_keep_rows_and_state(
    run: Run, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The store of files is another server, which a firewall may not let through.
    backend.files_at = "http://127.0.0.1:1"
    Image.new("RGB", (4, 4)).save(run.samples_picture)
    attempt(run, 30)
    there = sync(run, backend)
    assert_equal_histories(run, there)
    assert (there.state, there.files) == ("finished", {})


def test_each_row_has_the_time_of_when_it_was_written(run: Run, backend: Backend) -> None:
    attempt(run, 30, "preempt")
    between = time.time()
    attempt(run, 60)
    os.utime(run.metrics_file, (0, 0))  # the times were noted beside it
    there = sync(run, backend)
    timestamps = [row["_timestamp"] for row in there.history]
    assert timestamps == sorted(timestamps)
    assert between - 600 < timestamps[0] <= timestamps[29] <= between <= timestamps[30]


def test_a_failed_run_shows_why_and_its_recovery_clears_it(run: Run, backend: Backend) -> None:
    attempt(run, 70, "raise")
    there = sync(run, backend)
    assert (there.state, there.exit_code, "failed" in there.tags) == ("failed", 1, True)
    assert "ValueError: the bug" in there.notes
    attempt(run, 90)
    there = sync(run, backend)
    assert (there.state, "failed" in there.tags) == ("finished", False)
    assert "the bug" not in there.notes
    assert_equal_histories(run, there)


def test_what_a_person_wrote_in_the_page_stays(run: Run, backend: Backend) -> None:
    attempt(run, 30, "preempt")
    there = sync(run, backend)
    backend.edit(there.id, tags=[*there.tags, "keep"], notes="look at this\n\n" + there.notes)
    backend.edit(there.id, name="the good one", group="figure 3")
    attempt(run, 60)
    there = sync(run, backend)
    assert "keep" in there.tags
    assert "look at this" in there.notes
    assert (there.name, there.group) == ("the good one", "figure 3")


def test_a_run_that_was_killed_waits_for_its_next_attempt(run: Run, backend: Backend) -> None:
    killed_attempt(run, 10_000, rows=50)
    there = sync(run, backend)
    assert (there.state, "failed" in there.tags) == ("preempted", False)
    assert_equal_histories(run, there)


def test_a_run_that_trains_is_left_for_later(run: Run, backend: Backend) -> None:
    process = start_attempt(run, 100_000)
    try:
        wait_for(lambda: rows_written(run) > 20)
        done = sync_run(run)
        assert done.state == "running"
        assert f"process {process.pid}" in done.note
        assert backend.runs() == []
        assert not list(run.folder.glob("wandb/**/*.synced"))
    finally:
        kill(process)
    assert_equal_histories(run, sync(run, backend))


def test_wandbs_own_files_are_not_needed(run: Run, backend: Backend) -> None:
    attempt(run, 150, "preempt")
    shutil.rmtree(session_files(run)[0].parent)
    attempt(run, 200)
    session_files(run)[0].write_bytes(b"damaged")
    there = sync(run, backend)
    assert_equal_histories(run, there)
    assert there.config["lr"] == run.config().training.lr
    assert (there.group, there.name) == ("flows", "tracked")


def test_two_sessions_at_once_give_each_step_once(run: Run, backend: Backend) -> None:
    first = start_attempt(run, 100_000)
    wait_for(lambda: rows_written(run) > 60)
    os.kill(first.pid, signal.SIGSTOP)
    # Its node is thought to be dead, so another attempt is let in.
    (run.folder / ".lock").unlink()
    try:
        attempt(run, 300)
        os.kill(first.pid, signal.SIGCONT)
        # It goes on: its next checkpoint takes the place of the other's.
        checkpoint = run.folder / "checkpoint"
        wait_for(lambda: checkpoint.read_text() != "300" or first.poll() is not None)
    finally:
        kill(first)
    there = sync(run, backend)
    assert len({row["_step"] for row in there.history}) == len(there.history)
    assert [row for row in there.rows if row["step"] <= 300] == [row_of(s) for s in range(1, 301)]


def kill_often(run: Run, backend: Backend, kills: int, synced_between: bool) -> RunOnServer:
    chance = random.Random(kills)
    for number in range(kills):
        # The others die as soon as they have the rows, most before W&B has started.
        in_wandb = number % 3 == 0
        killed_attempt(run, 10**6, rows=chance.randrange(1, 400), in_wandb=in_wandb)
        if synced_between and chance.random() < 0.4:
            sync(run, backend)
    attempt(run, rows_written(run) + 30)
    return sync(run, backend)


@pytest.mark.parametrize("synced_between", [pytest.param(False, marks=pytest.mark.long), True])
def test_after_six_kills_the_server_has_every_step_once(
    run: Run, backend: Backend, synced_between: bool
) -> None:
    there = kill_often(run, backend, 6, synced_between)
    assert there.state == "finished"
    assert_equal_histories(run, there)
    assert there.rows == [row_of(step) for step in range(1, len(there.rows) + 1)]


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_after_fifty_kills_the_server_has_every_step_once(run: Run, backend: Backend) -> None:
    there = kill_often(run, backend, 50, synced_between=False)
    assert_equal_histories(run, there)
    assert there.rows == [row_of(step) for step in range(1, len(there.rows) + 1)]


def start_sync(
    study: Path, *arguments: str, stderr: int = subprocess.PIPE
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "flowjobs", "sync", "--study", str(study), *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


@contextlib.contextmanager
def slow(backend: Backend, delay_s: float) -> Iterator[None]:
    backend.delay_s = delay_s
    yield
    backend.delay_s = 0


def killed_sync(study: Path, backend: Backend, requests: int) -> None:
    """A sync that is killed after so many requests; it may have ended before."""
    before = len(backend.requests)
    with start_sync(study) as process:
        wait_for(lambda: len(backend.requests) >= before + requests or process.poll() is not None)
        kill(process)


def test_a_sync_killed_at_any_time_and_repeated_gives_each_step_once(
    study: Path, run: Run, backend: Backend
) -> None:
    other = new_run(study, "other")
    attempt(run, 300)
    attempt(other, 100)
    chance = random.Random(0)
    with slow(backend, 0.3):
        for _ in range(6):
            killed_sync(study, backend, chance.randrange(1, 8))
    with start_sync(study) as process:
        assert is_quiet(process.communicate(timeout=600)[1])
    assert process.returncode == 0
    for each in (run, other):
        there = backend.run(each.tracking_id())
        assert there.state == "finished"
        assert_equal_histories(each, there)


def test_a_terminal_sees_that_a_run_is_uploaded(study: Path, run: Run, backend: Backend) -> None:
    attempt(run, 100)
    terminal, end = os.openpty()
    said = b""
    with slow(backend, 0.3), start_sync(study, stderr=end) as process:
        os.close(end)
        with contextlib.suppress(OSError):  # so a terminal says that nobody writes any more
            while piece := os.read(terminal, 4096):
                said += piece
        assert process.communicate(timeout=600)[0] == "tracked: 100 rows uploaded, verified\n"
    os.close(terminal)
    assert b"uploading tracked" in said


def test_two_syncs_at_once_upload_once(study: Path, run: Run, backend: Backend) -> None:
    attempt(run, 100)
    with slow(backend, 0.2), start_sync(study) as first, start_sync(study) as second:
        outputs = [each.communicate(timeout=600) for each in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(said for said, _ in outputs) == [
        "tracked: 100 rows uploaded, verified\n",
        "tracked: unchanged since the last check, when the server had all\n",
    ]
    # Who waits for more than some seconds says for whom.
    lines = [line for _, errors in outputs for line in errors.splitlines()]
    assert all(line.startswith(("waiting to upload", "uploading tracked")) for line in lines)
    assert backend.run(run.tracking_id()).sessions == 1
    assert_equal_histories(run, backend.run(run.tracking_id()))


def test_an_upload_that_takes_long_is_said_where_no_terminal_shows_it(
    run: Run,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli_sync, "SAY_AFTER_S", 0.01)
    attempt(run, 30)
    capsys.readouterr()
    assert run_command(["sync"]) == 0
    said = capsys.readouterr()
    assert said.out == "tracked: 30 rows uploaded, verified\n"
    assert set(said.err.splitlines()) == {"uploading tracked"}  # not at each look


def test_an_upload_does_not_outlive_the_sync_that_is_killed(
    study: Path, run: Run, backend: Backend
) -> None:
    attempt(run, 100)
    with slow(backend, 0.5), start_sync(study) as process:
        wait_for(lambda: "RunResumeStatus" in backend.requests)
        backend.delay_s = 3600
        uploading = attempts.mirror_and_core(process.pid)
        kill(process)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in uploading))
    assert "lost W&B" not in run.mirror_log.read_text()  # it has not waited for an answer


def test_ctrl_c_ends_a_watch_in_peace(study: Path, run: Run, backend: Backend) -> None:
    attempt(run, 40, "preempt")
    with start_sync(study, "--watch", "--every-s", "0.2") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "tracked: 40 rows uploaded, verified\n"
        backend.go_down()
        attempt(run, 80, "preempt")
        assert any("cannot reach" in line for line in process.stderr)
        time.sleep(1)
        backend.come_back()
        assert process.stdout.readline() == "tracked: 40 rows uploaded, verified\n"
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=600)
        assert (said, "error" in errors) == ("", False)
    assert process.returncode == 0
    assert_equal_histories(run, backend.run(run.tracking_id()))


def test_a_server_that_fails_for_a_while_costs_no_row(
    study: Path, run: Run, backend: Backend
) -> None:
    attempt(run, 100)
    backend.fail_with = 503
    with start_sync(study) as process:
        wait_for(lambda: backend.failed >= 2)
        backend.fail_with = None
        wait_for(lambda: "RunResumeStatus" in backend.requests)
        backend.failed, backend.fail_with = 0, 500
        wait_for(lambda: backend.failed >= 2)
        backend.fail_with = None
        assert is_quiet(process.communicate(timeout=600)[1])
    assert process.returncode == 0
    assert_equal_histories(run, backend.run(run.tracking_id()))


@pytest.mark.parametrize("answer", [500, 200])
def test_an_upload_that_does_not_arrive_is_given_up_and_continues_later(
    run: Run, backend: Backend, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(run, 100)
    take = backend._file_stream
    asked = threading.Event()

    def take_none(run_id: str, sent: object) -> tuple[int, Any]:
        asked.set()
        return answer, {}  # what a server says that takes none is no error to the client

    def started(*arguments: Any) -> "subprocess.Popen[bytes]":
        mirror = start_mirror(*arguments)
        asked.wait(600)  # its time begins when it has rows to send
        return mirror

    backend._file_stream = take_none  # type: ignore[method-assign]
    with monkeypatch.context() as hurried:
        hurried.setattr("flowjobs.tracking.sync.start_mirror", started)
        hurried.setattr("flowjobs.tracking.sync.upload_limit_s", lambda run: 4.0)
        with pytest.raises(TrackingError, match="has not taken all of it in time; sync again"):
            sync(run, backend)
    assert asked.is_set()
    backend._file_stream = take  # type: ignore[method-assign]
    # The server may have some of its rows: a plain `wandb sync` would number those anew.
    assert session_files(run) == []
    assert_equal_histories(run, sync(run, backend))


def test_one_run_that_fails_does_not_keep_the_rest(
    study: Path, run: Run, backend: Backend, flowjobs: Command
) -> None:
    broken, refused = new_run(study, "broken"), new_run(study, "refused")
    broken.config_file.write_text("{")
    attempt(refused, 20)
    attempt(run, 30)
    backend.refuse_with = (400, "invalid parameters: 64 limit exceeded for JobType")
    backend.refuse_only = refused.tracking_id()
    done = flowjobs("sync")
    assert done.returncode == 1
    assert "error: broken: " in done.stderr
    assert "holds no JSON object" in done.stderr
    assert "error: refused: W&B refuses it (invalid parameters: 64 limit exceeded" in done.stderr
    assert done.stdout == "tracked: 30 rows uploaded, verified\n"
    assert "W&B refuses it (invalid" in flowjobs("status", "refused").stdout


def test_a_wandb_that_cannot_be_loaded_is_no_slow_server(
    run: Run,
    backend: Backend,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (workplace / "wandb.py").write_text("raise TypeError('Descriptors cannot\\nMore: at https')")
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    monkeypatch.setattr("flowjobs.tracking.tracker.SHORT_FINISH_S", 600.0)
    attempt(run, 30, is_told=False)
    why = f"has failed: TypeError: Descriptors cannot (see {run.mirror_log})"
    assert f"W&B does not know that tracked is finished: the process that tells W&B {why}" in (
        caplog.text
    )
    with pytest.raises(TrackingError, match=re.escape(why)):
        sync_run(run)


def test_a_wrong_key_and_no_key_say_what_to_do(
    run: Run, backend: Backend, flowjobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(run, 30)
    monkeypatch.setenv("WANDB_API_KEY", KEY[:-1] + "f")
    done = flowjobs("sync")
    assert done.returncode == 2
    assert "W&B refuses the login here" in done.stderr
    assert "wandb login --relogin` or mend WANDB_API_KEY" in done.stderr
    assert "sync again" not in done.stderr
    monkeypatch.delenv("WANDB_API_KEY")
    done = flowjobs("sync")
    assert done.returncode == 2
    assert f"no login for W&B at {backend.url}: run `{program('wandb')} login` once" in done.stderr
    assert backend.runs() == []


def test_a_server_that_is_down_is_an_error_at_once(
    run: Run, backend: Backend, flowjobs: Command
) -> None:
    attempt(run, 30)
    backend.go_down()
    done = flowjobs("sync")
    assert done.returncode == 1
    assert f"cannot reach W&B at {backend.url}" in done.stderr


def test_a_run_that_is_not_tracked_is_not_uploaded(
    study: Path, backend: Backend, flowjobs: Command
) -> None:
    run = Run(study, "secret")
    run.create(RunConfig(TrainingConfig(), tracking=TrackingConfig(wandb_mode="disabled")))
    attempt(run, 20)
    new_run(study, "waiting")
    done = flowjobs("sync")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"secret: not tracked: {run.config_file} says wandb_mode disabled; submit it with "
        "--wandb-mode online, or write that there, "
        f"and `{hint('sync', run.name, study=study)}` uploads it\n"
        "waiting: not tracked: it has not started\n"
    )
    assert backend.runs() == []


def test_a_run_that_trained_without_wandb_is_uploaded_once_it_is_named(
    study: Path, backend: Backend, flowjobs: Command
) -> None:
    run = new_run(study, "secret", "disabled")
    attempt(run, 20)
    run.create(dataclasses.replace(run.config(), tracking=TrackingConfig(wandb_mode="online")))
    # Neither by what cron does, nor with all others.
    assert flowjobs("reconcile").returncode == 0
    sync_it = hint("sync", run.name, study=study)
    kept_out = f"not tracked: it trained without W&B; `{sync_it}` uploads it"
    assert flowjobs("sync").stdout == f"secret: {kept_out}\n"
    assert (backend.runs(), run.tracking_file.exists()) == ([], False)
    assert flowjobs("sync", "secret").stdout == "secret: 20 rows uploaded, verified\n"
    assert_equal_histories(run, backend.run(run.tracking_id()))


def test_an_unknown_run_is_an_error_that_lists_those_there_are(
    run: Run, backend: Backend, flowjobs: Command
) -> None:
    done = flowjobs("sync", "trackd")
    assert done.returncode == 2
    assert "there is only tracked" in done.stderr


def test_the_shell_of_the_sync_does_not_change_what_is_uploaded(
    run: Run, backend: Backend, flowjobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(run, 30)
    for name, text in {
        "WANDB_MODE": "offline",
        "WANDB_SERVICE": "3-1-tcp-localhost-1",
        "WANDB_PROJECT": "another",
        "WANDB_RUN_ID": "another",
    }.items():
        monkeypatch.setenv(name, text)
    done = flowjobs("sync")
    assert (done.returncode, is_quiet(done.stderr)) == (0, True)
    assert_equal_histories(run, backend.run(run.tracking_id()))


def test_the_entity_is_the_one_that_the_run_was_submitted_with(
    study: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(study, "tracked")
    run.create(RunConfig(TrainingConfig(), tracking=TrackingConfig(wandb_entity="the-lab")))
    attempt(run, 30)
    monkeypatch.setenv("WANDB_ENTITY", "another-lab")
    there = sync(run, backend)
    assert there.entity == "the-lab"
    assert_equal_histories(run, there)


def test_an_account_with_another_default_entity_syncs_the_same_run(
    run: Run, backend: Backend
) -> None:
    attempt(run, 30, "preempt")
    before = sync(run, backend)
    backend.entity = "a-colleague"
    attempt(run, 60)
    assert_equal_histories(run, sync(run, backend))
    assert backend.run(before.id).entity == before.entity


def test_the_server_is_the_one_that_the_run_was_submitted_with(
    study: Path, backend: Backend, flowjobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = Run(study, "tracked"), new_run(study, "other", "disabled")
    there = TrackingConfig(wandb_base_url=backend.url, wandb_mode="online")
    run.create(RunConfig(TrainingConfig(), tracking=there))
    with contextlib.suppress(ValueError), Attempt(run, JobInfo.in_foreground()):
        raise ValueError
    # Here is another server, whose key is not sent to that one.
    elsewhere = Backend()
    for name, value in elsewhere.environment.items():
        monkeypatch.setenv(name, value)
    assert close_session(run)
    alone, all_runs = flowjobs("sync", run.name), flowjobs("sync")
    log_in = f"`{program('wandb')} login --host {backend.url}`"
    refused = f"no login for W&B at {backend.url}: run {log_in} once"
    assert (alone.returncode, refused in alone.stderr) == (2, True), alone.stderr
    assert (all_runs.returncode, refused in all_runs.stderr) == (2, True), all_runs.stderr
    assert flowjobs("sync", other.name).stdout.startswith(f"{other.name}: not tracked: ")
    assert (backend.requests, elsewhere.requests) == ([], [])

    # Nor was that taken for the server's own refusal.
    login = study.parent / "netrc"
    monkeypatch.setenv("NETRC", str(login))
    login.write_text(f"machine {urlsplit(backend.url).netloc} login user password {KEY}\n")
    login.chmod(0o600)
    assert close_session(run)
    assert pending_outcome(run) is None
    done = flowjobs("sync", run.name)
    assert (done.returncode, done.stdout) == (0, f"{run.name}: all of it is on the server\n")
    assert_equal_histories(run, backend.run(run.tracking_id()))
    assert elsewhere.requests == []
    assert "unchanged since the last check, when the server had all" in flowjobs("sync").stdout
    elsewhere.go_down()


def test_another_server_of_the_shell_does_not_move_a_run_that_a_server_has(
    study: Path, backend: Backend, flowjobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(study, "tracked", "online")
    attempt(run, 30, "preempt")
    sync(run, backend)
    elsewhere = Backend()
    for name, value in elsewhere.environment.items():
        monkeypatch.setenv(name, value)
    left_over = TrackingConfig(wandb_base_url=elsewhere.url, wandb_mode="online")
    assert run.create(RunConfig(run.config().training, tracking=left_over)).startswith(
        "tracked stays in W&B's"
    )
    attempt(run, 60, is_told=False)
    done = flowjobs("sync", "tracked")
    assert f"no login for W&B at {backend.url}" in done.stderr
    assert elsewhere.requests == []
    monkeypatch.setenv("WANDB_BASE_URL", backend.url)
    assert_equal_histories(run, sync(run, backend))
    elsewhere.go_down()


def wandb_sync(run: Run) -> None:
    """What a user does by hand."""
    command = [str(Path(sys.executable).with_name("wandb")), "sync", "--yes"]
    subprocess.run([*command, str(run.folder / "wandb")], check=True, capture_output=True)


def test_a_plain_wandb_sync_afterwards_uploads_nothing_twice(run: Run, backend: Backend) -> None:
    attempt(run, 30)
    there = sync(run, backend)
    wandb_sync(run)
    assert backend.run(there.id) == there


def test_a_plain_wandb_sync_alone_gives_each_step_once(run: Run, backend: Backend) -> None:
    attempt(run, 50, "preempt")
    killed_attempt(run, 10_000, rows=100)
    time.sleep(1)  # a session's folder is named by the second
    attempt(run, 300, "raise")
    time.sleep(1)
    attempt(run, 330)
    wandb_sync(run)
    there = backend.run(run.tracking_id())
    assert_equal_histories(run, there)
    assert (there.state, there.summary["train/loss"]["min"]) == ("finished", 0)


def test_after_a_sync_an_offline_attempt_continues_for_either_kind(
    run: Run, backend: Backend
) -> None:
    attempt(run, 50, "preempt")
    backend.edit(sync(run, backend).id, name="the good one", group="figure 3")
    attempt(run, 90)
    wandb_sync(run)
    there = backend.run(run.tracking_id())
    assert_equal_histories(run, there)
    assert (there.name, there.group) == ("the good one", "figure 3")


def test_a_run_whose_server_was_never_there_is_uploaded_with_identity_and_picture(
    study: Path, backend: Backend
) -> None:
    run = new_run(study, "tracked", "online")
    Image.new("RGB", (4, 3)).save(run.samples_picture)
    backend.go_down()
    attempt(run, 50, is_told=False)
    assert not session_files(run)
    backend.come_back()
    there = sync(run, backend)
    shown = there.rows[-1]["samples"]
    assert_equal_histories(run, there)
    assert there.summary["samples"] == shown
    assert (shown["width"], shown["height"]) == (4, 3)
    assert there.files[shown["path"]] == run.samples_picture.read_bytes()
    assert there.state == "finished"
    assert there.config["signature"] == run.config().training.signature
    assert there.config["torch_version"]
    assert there.config["host"] == socket.gethostname()
    assert [known["attempt"] for known in there.config["attempts"]] == [1]


def test_a_run_that_another_node_trains_is_left_for_later(run: Run, backend: Backend) -> None:
    attempt(run, 50, "preempt")
    status = run.status()
    status.state, status.attempts[-1].ended = "running", None
    newest = status.attempts[-1]
    newest.job = dataclasses.replace(newest.job, host="n7")
    status.write(run.status_file)
    done = sync_run(run)
    assert (done.state, "on n7" in done.note) == ("running", True)
    assert backend.runs() == []
    for file in (run.status_file, run.metrics_file):
        os.utime(file, (0, 0))
    assert sync(run, backend).state == "preempted"


def test_a_damaged_status_does_not_stop_a_sync(run: Run, backend: Backend) -> None:
    attempt(run, 30)
    run.status_file.write_text("{")
    assert run.status() == RunStatus()
    assert len(sync(run, backend).rows) == 30
    RunStatus("finished", exit_code=0).write(run.status_file)
    assert sync(run, backend).state == "finished"
