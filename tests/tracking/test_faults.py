"""Whatever happens to W&B: training ends well and in time, and the rows arrive when they can."""

import errno
import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
from wandb.errors import CommError, WandbCoreNotAvailableError

from flowjobs.errors import ServerError
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.tracking.mode import check_server_answers, server_url
from flowjobs.tracking.process import close_session, pending_outcome, upload_limit_s
from flowjobs.tracking.record import read_uploaded, refusal_of
from tests.cluster.waiting import wait_until
from tests.tracking import attempts
from tests.tracking.backend import Backend
from tests.tracking.conftest import MakeRun
from tests.tracking.history import (
    assert_history_is_exact,
    finish_and_tell,
    on_server,
    run_to_the_end,
    without_picture,
)
from tests.tracking.leet import offline_rows

FAULTS = ["down", "error", "key", "hang"]


def break_server(backend: Backend, fault: str) -> None:
    match fault:
        case "down":
            backend.go_down()
        case "error":
            backend.fail_with = 500
        case "key":
            backend.fail_with = 401
        case "hang":
            backend.delay_s = 3600


def mend_server(backend: Backend, fault: str) -> None:
    backend.fail_with, backend.delay_s = None, 0
    if fault in ("down", "hang"):
        backend.go_down()  # lets go of the requests that hang
        backend.come_back()


def tell_what_is_pending(run: Run) -> None:
    status = run.status()
    assert status.outcome is not None
    assert pending_outcome(run) == (None if read_uploaded(run).refusal else status.outcome)
    assert close_session(run)
    assert pending_outcome(run) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_from_the_start_costs_nothing_but_the_wait_at_the_end(
    tracked_run: MakeRun, backend: Backend, fault: str
) -> None:
    run, _ = tracked_run("online")
    break_server(backend, fault)
    attempts.hold(run, 490)
    process = attempts.start(run, 500, pace_s=0.02)
    attempts.wait_for_rows(run, 1)
    if fault == "hang":  # wandb waits for minutes: a start that waited, too, would come after that
        assert "lost W&B" not in run.mirror_log.read_text()
    if fault == "key":
        wait_until(lambda: read_uploaded(run).refusal, "the refusal", 600)
        wait_until(lambda: not list(run.folder.glob("wandb/run-*")), "the end of that try", 600)
    attempts.let_go(run)
    code, said = attempts.finish(process)
    assert code == 0, said
    assert said.count("W&B cannot be told now") <= 1
    assert f"flowjobs sync {run.name}` tries again" in said or fault == "key"
    assert said.count("wandb login --relogin`") == (2 if fault == "key" else 0)
    assert len(list(read_rows(run.metrics_file))) == 50
    # Of the tries that failed nothing is left; the last one was ended in its middle.
    assert len(list(run.folder.glob("wandb/run-*"))) <= (0 if fault in ("down", "key") else 1)

    mend_server(backend, fault)
    tell_what_is_pending(run)
    assert_history_is_exact(run, backend)
    assert on_server(run, backend).state == "finished"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_in_the_middle_gets_everything_when_it_is_back(
    tracked_run: MakeRun, backend: Backend, fault: str
) -> None:
    run, _ = tracked_run("online")
    attempts.hold(run, 400)
    process = attempts.start(run, 2000, pace_s=0.02)
    attempts.mirror_and_core(process.pid)
    attempts.wait_for_rows(run, 40)
    break_server(backend, fault)
    attempts.hold(run, 800)
    attempts.wait_for_rows(run, 80)
    mend_server(backend, fault)
    attempts.let_go(run)
    code, said = attempts.finish(process)
    assert code == 0, said
    if pending_outcome(run) or read_uploaded(run).refusal:
        tell_what_is_pending(run)
    assert_history_is_exact(run, backend)
    assert on_server(run, backend).state == "finished"


def test_a_preempted_attempt_does_not_wait_for_a_server_that_went_away(
    tracked_run: MakeRun, backend: Backend
) -> None:
    run, _ = tracked_run("online")
    attempts.hold(run, 1000)
    process = attempts.start(run, 5000, pace_s=0.02)
    attempts.mirror_and_core(process.pid)
    attempts.wait_for_rows(run, 60)
    backend.go_down()
    process.terminate()
    began = time.monotonic()
    code, said = attempts.finish(process)
    assert code == 75, said
    assert time.monotonic() - began < upload_limit_s(run)  # which W&B may take otherwise
    attempts.let_go(run)
    backend.come_back()
    run_to_the_end(run, 1500)
    assert_history_is_exact(run, backend)


def test_a_service_of_another_process_is_not_joined(
    tracked_run: MakeRun, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "3-12345-unix-/tmp/no-such-socket")
    monkeypatch.setenv("WANDB_RUN_ID", "another-run")
    run, _ = tracked_run("online")
    run_to_the_end(run, 500)
    assert backend.runs() == [run.tracking_id()]
    assert_history_is_exact(run, backend)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_mirror_that_is_killed_costs_no_row(tracked_run: MakeRun, mode: str) -> None:
    run, backend = tracked_run(mode)
    attempts.hold(run, 500)
    process = attempts.start(run, 1000, pace_s=0.02)
    mirror, core = attempts.mirror_and_core(process.pid)
    attempts.wait_for_rows(run, 40)
    attempts.kill(mirror, core)
    attempts.mirror_and_core(process.pid, but=mirror)  # takes its place while the attempt trains
    attempts.let_go(run)
    finish_and_tell(run, process)
    assert pending_outcome(run) is None
    assert_history_is_exact(run, backend)


def test_a_mirror_that_cannot_read_what_it_needs_is_started_again(
    tracked_run: MakeRun, backend: Backend
) -> None:
    run, _ = tracked_run("online")
    # As where a file server is away for a while.
    surroundings = run.surroundings_file
    surroundings.mkdir(parents=True)
    attempts.hold(run, 500)
    process = attempts.start(run, 1000, pace_s=0.02)
    wait_until(run.mirror_log.exists, "the first to start", 60)
    wait_until(lambda: "IsADirectoryError" in run.mirror_log.read_text(), "it to end", 60)
    surroundings.rmdir()
    attempts.mirror_and_core(process.pid)
    attempts.let_go(run)
    said = finish_and_tell(run, process)
    assert "another one starts" in said
    assert_history_is_exact(run, backend)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_two_attempts_alive_at_once_give_each_step_once(tracked_run: MakeRun, mode: str) -> None:
    run, backend = tracked_run(mode)
    attempts.hold(run, 480)  # past its checkpoint
    first = attempts.start(run, 1000, pace_s=0.02)
    attempts.mirror_and_core(first.pid)
    attempts.wait_for_rows(run, 48)
    # As when only slurmd has died: nothing keeps the second one from starting.
    (run.folder / ".lock").unlink()
    attempts.kill(first.pid, with_signal=signal.SIGSTOP)
    attempts.hold(run, 1400)
    second = attempts.start(run, 1500, pace_s=0.02)
    attempts.wait_for_rows(run, 140)
    attempts.kill(first.pid, with_signal=signal.SIGCONT)  # which is behind now, and goes on
    attempts.finish(first)
    attempts.let_go(run)
    finish_and_tell(run, second)
    expected = [attempts.row_at(10 * number) for number in range(1, 151)]
    if backend is None:
        assert without_picture(offline_rows(run)) == expected
        return
    found = on_server(run, backend)
    assert without_picture(found.rows) == expected
    assert [row["_step"] for row in found.received] == [row["step"] for row in expected]
    assert found.state == "finished"


@pytest.mark.parametrize(
    "trouble",
    [
        PermissionError(errno.EACCES, "Permission denied", "/lib/wandb/bin/wandb-core"),
        WandbCoreNotAvailableError("File not found: /lib/wandb/bin/wandb-core. Please contact"),
        CommError("open /home/me/.cache/wandb/x: permission denied"),
        CommError("dial tcp 10.0.0.1:443: connect: permission denied"),
        CommError("dial tcp: lookup host on 10.0.0.1:53: not found"),
    ],
)
def test_trouble_on_this_machine_is_no_refusal(study: Path, trouble: Exception) -> None:
    assert refusal_of(trouble, attempts.make_run(study, "online")) is None


def test_a_network_that_may_not_be_used_is_no_refusal_and_a_servers_no_is_one(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(ServerError, match="Permission denied") as met:
        check_server_answers(server_url())
    run = attempts.make_run(workplace / "another", "online")
    assert refusal_of(met.value, run) is None
    refusal = refusal_of(CommError("returned error 403: permission denied"), run)
    assert refusal is not None
    # What is to be done can be typed as it stands.
    assert refusal.text.endswith(f"flowjobs sync {run.name} --study another`")


def test_a_full_disk_costs_no_row(tracked_run: MakeRun) -> None:
    run, _ = tracked_run("offline")
    attempts.hold(run, 10)  # or all rows may be in it before that
    process = attempts.start(run, 1000, pace_s=0.02)
    _, core = attempts.mirror_and_core(process.pid)
    # What a full disk does to wandb's file, and to that alone.
    resource.prlimit(core, resource.RLIMIT_FSIZE, (3000, 3000))
    attempts.let_go(run)
    code, said = attempts.finish(process)
    assert code == 0, said
    tell_what_is_pending(run)
    assert_history_is_exact(run, None)


def test_without_an_account_nothing_asks_for_one(
    tracked_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tracked_run("online")
    monkeypatch.delenv("WANDB_API_KEY")
    said = run_to_the_end(run, 1000)
    assert "wandb.ai/authorize" not in said
    assert not os.path.exists(os.path.expanduser("~/.netrc"))
    assert read_uploaded(run).refusal is None  # whoever has a key tells it
    assert pending_outcome(run)
