"""What a person sees in a terminal of any width, and what another program reads."""

import fcntl
import itertools
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowjobs.cli import live_line
from flowjobs.config import RunConfig, TrackingConfig
from flowjobs.errors import RunInterrupted
from flowjobs.runs.attempt import Attempt
from flowjobs.runs.hint import hint, program
from flowjobs.runs.metrics import MetricsFile
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo, Outcome
from flowjobs.tracking.mode import resolve_mode
from tests.conftest import Command
from tests.jobs.disturbed import REPOSITORY
from tests.report.made_up import made_run

QUICK = ("--cluster", "local", "--wandb-mode", "disabled", "--arch-args", "width=8", "depth=1")


def shown_in_terminal(columns: int, *arguments: str) -> str:
    """What `flowjobs` prints in a terminal of this width, without its colours."""
    printed = printed_in_terminal(columns, *arguments, TERM="xterm")
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed)


def printed_in_terminal(columns: int, *arguments: str, **variables: str) -> str:
    """What it prints there, every code of it."""
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, **variables}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "flowjobs", *arguments],
        stdin=far,
        stdout=far,
        stderr=far,
        env=environment,
        start_new_session=True,
    )
    os.close(far)
    shown = b""
    try:
        while some := os.read(near, 65536):
            shown += some
    except OSError:
        pass  # the terminal's other side is closed
    process.wait(timeout=240)
    os.close(near)
    return shown.decode()


@pytest.mark.parametrize("columns", [80, 40])
def test_the_live_line_has_what_counts_on_one_row(workplace: Path, columns: int) -> None:
    shown = shown_in_terminal(columns, "submit", "--epochs", "40", *QUICK)
    rows = [row for row in re.split(r"[\r\n]+", shown) if "epoch " in row]
    assert rows
    assert max(map(len, rows)) <= columns
    row = rows[-1]
    assert "━" in row
    assert "epoch 40/40 0:00:00" in row
    if columns == 80:
        assert re.search(r"val/loss \d\.\d{4}  best \d\.\d{4}", row)


def test_elsewhere_there_is_a_line_for_each_state(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    control = workplace / "control"
    control.write_text("hold")  # until it is seen to run
    model = ("--arch", "tests.jobs.slow_model:SlowModel", "--arch-args", "control=control")
    command = ["submit", "--epochs", "40", *model, "pause_s=0", *QUICK[:4]]
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "flowjobs", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("running, epoch "):
                control.write_text("")
    told = re.compile("(waiting for the job to start|running|finished)(, |$)")
    states = [found[1] for line in lines if (found := told.match(line))]
    once = [state for state, _ in itertools.groupby(states)]
    all_three = ["waiting for the job to start", "running", "finished"]
    assert once in (all_three, all_three[1:])  # the first look may be late
    assert any(
        re.fullmatch(r"finished, epoch 40/40, val/loss \S+  best \S+  train/loss \S+", line)
        for line in lines
    )


def test_a_line_that_says_nothing_new_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passed = [0.0]
    monkeypatch.setattr(live_line, "time", SimpleNamespace(monotonic=lambda: passed[0]))
    plain = live_line.PlainLines()
    for second in range(0, 70, 10):
        passed[0] = second
        plain.say("running", f"running for {second} s")
    plain.say("finished", "finished")
    assert capsys.readouterr().out == "running for 0 s\nrunning for 40 s\nfinished\n"


def running(study: Path, name: str) -> None:
    """A run that died between two looks of status.json at its rows."""
    run = Run(study, name)
    run.create(RunConfig())
    run.add_submission("1234567", "debug", None)
    attempt = Attempt(run, JobInfo("debug", "1234567", None, "elsewhere", 1))
    attempt.__enter__()
    attempt.start_at(0)
    attempt.progress(23, 4600, 1, 1.4553)
    rows = MetricsFile(run.metrics_file, after_step=0)
    rows.append({"step": 46, "epoch": 1, "val/loss": 1.4008, "val/best_loss": 1.4008})
    rows.close()


@pytest.mark.parametrize("columns", [100, 80, 60, 40])
def test_status_breaks_no_word(workplace: Path, study: Path, columns: int) -> None:
    name = "resnet-otcfm-embeddings5k-none-lr0.0003-seed1"
    running(study, name)
    shown = shown_in_terminal(columns, "status")
    head, row = (line.rstrip() for line in shown.splitlines())
    assert max(len(head), len(row)) <= columns
    titles, cells = (re.split(" {2,}", line) for line in (head, row))
    beginning, _, end = cells[0].partition("…")
    assert name.startswith(beginning)
    assert name.endswith(end)
    assert ("…" in cells[0]) == (columns < 80)
    assert len(cells) == len(titles)  # on a busy machine there is a speed, as "15 steps/s"
    # No best is shown that is worse than the loss beside it.
    values = dict(zip(titles, cells, strict=True))
    known = {"state": "running", "step": "46/4600", "val/loss": "1.4008", "best": "1.4008"}
    assert {key: values[key] for key in known if key in values}.items() <= known.items()
    assert "val/loss" in values


@pytest.mark.parametrize("columns", [80, 50])
def test_the_runs_of_a_sweep_over_several_fields_can_be_told_apart(
    study: Path, columns: int
) -> None:
    names = [
        f"mlp-icfm-digits-none-lr{lr}-batch_size{size}-seed{seed}"
        for lr in (0.001, 0.0003)
        for size in (64, 256)
        for seed in range(3)
    ]
    for name in names:
        made_run(study, [1.0] * 3, name=name, epochs=1000)
    head, *rows = shown_in_terminal(columns, "status", *names).splitlines()
    found = []
    for row in rows:
        shown = ".*".join(map(re.escape, row.split()[0].split("…")))
        found += [name for name in names if re.fullmatch(shown, name)]
    assert sorted(found) == sorted(names)
    assert head.split()[:2] == ["run", "state"]
    assert max(map(len, (head, *rows))) <= columns


@pytest.mark.parametrize("command", ["status", "status a b", "show a"])
def test_why_a_run_failed_is_broken_at_words(study: Path, command: str) -> None:
    words = [f"reason-{number}" for number in range(30)]
    for name in "ab":
        run = made_run(study, [1.0], name=name, group="some")
        status = run.status()
        status.record_outcome(Outcome("failed", 1, " ".join(words), kind="exception"))
        status.write(run.status_file)
    shown = shown_in_terminal(80, *command.split()).splitlines()
    lines = [line for line in shown if "reason-" in line]
    assert max(map(len, lines)) <= 80
    assert " ".join(words) in " ".join(map(str.strip, lines))


def test_groups_keep_their_names_and_whole_words(workplace: Path, study: Path) -> None:
    for number in range(3):
        made_run(study, [1.0] * (3 - number), name=f"run-{number}", group="learning-rates")
    shown = shown_in_terminal(40, "status").splitlines()
    assert max(map(len, shown)) <= 40
    head, row, *_, last = shown
    assert head.split()[:3] == ["group", "of", "finished"]
    assert "…" not in head
    assert row.split() == ["learning-rates", "3", "3"]
    assert "run-2" in last


def test_another_program_reads_whole_names(
    flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "resnet-otcfm-embeddings5k-none-lr0.0003-batch_size256-weight_decay0.01-seed1"
    running(study, name)
    with monkeypatch.context() as colours:
        colours.setenv("FORCE_COLOR", "1")
        colours.setenv("TERM", "dumb")
        # pytest's readline exports it, and rich would not look at TERM.
        colours.setenv("LINES", "")
        head, row = flowjobs("status").stdout.splitlines()
        assert (name in row, "step" in head.split()) == (True, True)
    shown = flowjobs("status", name).stdout
    assert "steps 0 to 46, running" in shown
    assert re.search(
        r"attempt 1: \S+ \S+ UTC for \d+:\d\d:\d\d, debug job 1234567 on elsewhere", shown
    )


def test_ctrl_c_is_no_preemption(flowjobs: Command, study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig())
    with pytest.raises(RunInterrupted), Attempt(run, JobInfo("none", "12", None, "n1", 1)):
        raise RunInterrupted("interrupted by Ctrl-C", 9, kind="told to leave")
    shown = flowjobs("status", "a").stdout
    assert "preempted" not in shown
    assert shown.splitlines()[1].split()[1] == "interrupted"
    assert "in the foreground as process 12 on n1, no step, interrupted by Ctrl-C; saved" in shown
    assert json.loads(flowjobs("status", "a", "--json").stdout)["state"] == "preempted"


def test_hints_work_as_they_stand(
    workplace: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Path(sys.executable).parent
    other, dashed = workplace / "it's another", workplace / "-s"
    for folder in (study, other, dashed):
        Run(folder, "a").create(RunConfig())
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for folder in (study, other, dashed):
        line = hint("status", "a", study=folder)
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert f"folder {folder}" in done.stdout
    assert hint("status", "a") == f"{scripts}/flowjobs status a"
    assert program("wandb") == f"{scripts}/wandb"
    assert f"`{scripts}/wandb login`" in resolve_mode(TrackingConfig())[1]
    assert f"{scripts}/flowjobs submit --help" in after_a_mistake()
    assert shlex.split(hint("status", "a", study=other))[-1] == "it's another"
    # Another flowjobs on PATH is not ours; ours is called by its name.
    (workplace / "bin").mkdir()
    shutil.copy("/bin/true", workplace / "bin/flowjobs")
    monkeypatch.setenv("PATH", f"{workplace / 'bin'}:/usr/bin:/bin")
    assert hint("status", "a") == f"{scripts}/flowjobs status a"
    monkeypatch.setenv("PATH", f"{scripts}:/usr/bin:/bin")
    assert hint("status", "a") == "flowjobs status a"
    assert program("wandb") == "wandb"
    assert " flowjobs submit --help" in after_a_mistake()


def after_a_mistake() -> str:
    command = [sys.executable, "-m", "flowjobs", "submit", "--lrr", "1"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.stderr


def test_a_terminal_that_draws_nothing_gets_no_codes(study: Path) -> None:
    made_run(study, [1.0])

    def codes(*arguments: str, **variables: str) -> list[str]:
        return re.findall(r"\x1b", printed_in_terminal(80, *arguments, **variables))

    for words in (["--help"], ["status", "--watch"]):
        assert codes(*words, TERM="xterm")
    assert not codes("--help", TERM="xterm", NO_COLOR="1")
    assert not codes("status", "--watch", TERM="dumb")


def test_errors_have_no_colours_outside_of_a_terminal(workplace: Path) -> None:
    near, far = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "flowjobs", "submit", "--lrr", "1"],
        stdout=far,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm"},
        check=False,
    )
    os.close(far)
    os.close(near)
    assert done.returncode == 2
    assert b"--lrr" in done.stderr
    assert b"\x1b" not in done.stderr
