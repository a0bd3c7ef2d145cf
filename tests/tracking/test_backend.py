"""The local backend does to the real client what the hosted server would."""

import os
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from tests.tracking.backend import Backend

# That the stand-in is true to the server: what rests on it is tested each time.
by_hand = pytest.mark.long

INIT = """
import wandb
run = wandb.init(project="p", id="a-run", name="a name", group="g", config={"lr": 0.5},
    tags=["mine"], notes="seen", resume="allow",
    settings=wandb.Settings(console="off", silent=True, init_timeout=%d))
run.define_metric("loss", summary="min")
"""


def client(code: str, init_timeout_s: int = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", INIT % init_timeout_s + code],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_run_arrives_whole(backend: Backend) -> None:
    done = client("for step in 1, 2: run.log({'loss': 1 / step}, step=step, commit=True)\n")
    assert done.returncode == 0, done.stderr
    run = backend.run("a-run")
    assert (run.project, run.group, run.name, run.state) == ("p", "g", "a name", "finished")
    assert (run.tags, run.notes, run.config) == (["mine"], "seen", {"lr": 0.5})
    assert run.rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    assert run.summary == {"loss": {"min": 0.5}}
    assert "requirements.txt" in run.files


@by_hand
def test_states_follow_from_the_exit_code(backend: Backend) -> None:
    client("run.finish(exit_code=3)")
    run = backend.run("a-run")
    assert (run.state, run.exit_code) == ("failed", 3)
    client("run.mark_preempting(); run.finish(exit_code=75)")
    run = backend.run("a-run")
    assert (run.state, run.exit_code) == ("preempted", 75)
    client("import os, signal, time; time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)")
    assert backend.run("a-run").state == "running"
    assert backend.run("a-run").sessions == 3


@by_hand
def test_a_resumed_session_learns_of_the_last_step(backend: Backend) -> None:
    client("run.log({'loss': 1}, step=7, commit=True)")
    backend.edit("a-run", tags=["theirs"], notes="by hand")
    done = client("print(run.starting_step, run.resumed, run.tags, run.notes)")
    assert done.stdout.split("\n")[0] == "8 True ('mine',) seen"


def test_a_row_at_a_step_that_is_there_is_dropped(backend: Backend) -> None:
    client("run.log({'loss': 1}, step=7, commit=True)")
    stored = backend._runs["a-run"]
    stored.add_history(1, ['{"_step": 7, "loss": 2}', '{"_step": 8, "loss": 3}'])
    stored.add_history(2, ['{"_step": 8, "loss": 3}'])
    run = backend.run("a-run")
    assert [row["_step"] for row in run.received] == [7, 7, 8]
    assert [row["loss"] for row in run.history] == [1, 3]
    assert run.dropped == [{"_step": 7, "loss": 2}]


@by_hand
def test_what_came_while_it_was_down_arrives_later(backend: Backend) -> None:
    code = "print(1, flush=True)\ninput()\nrun.log({'loss': 1}, step=1)\nrun.finish()"
    command = [sys.executable, "-c", INIT % 240 + code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        backend.go_down()
        # Until somebody has come in vain to the address.
        address = urlsplit(backend.url)
        with socket.create_server((address.hostname or "", address.port or 0)) as dead:
            dead.settimeout(600)
            process.stdin.write("\n")
            process.stdin.flush()
            dead.accept()[0].close()
        backend.come_back()
        assert process.wait(timeout=600) == 0
    assert len(backend.run("a-run").history) == 1


@by_hand
@pytest.mark.parametrize("fault", ["key", "down", "error"])
def test_a_client_that_gets_no_answer_raises(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "key":
        monkeypatch.setenv("WANDB_API_KEY", "local-" + "f" * 40)
    elif fault == "down":
        backend.go_down()
    else:
        backend.fail_with = 500
    done = client("", 8)
    assert done.returncode != 0, done.stderr
    assert backend.runs() == []
    assert os.environ["WANDB_BASE_URL"] == backend.url
