"""Commands on a selection of runs."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.cli.main import run as run_command
from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.errors import RunNotFoundError
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, RunStatus, now
from tests.conftest import Command


@pytest.fixture
def grid(study: Path) -> Path:
    for seed in range(3):
        for flow in ("icfm", "otcfm"):
            training = TrainingConfig(flow=flow, seed=seed)  # type: ignore[arg-type]
            Run(study, f"{flow}-{seed}").create(RunConfig(training))
    return study


def test_status_of_a_selection(flowjobs: Command, grid: Path) -> None:
    found = json.loads(flowjobs("status", "flow=otcfm", "--json").stdout)
    assert [run["run"] for run in found] == ["otcfm-0", "otcfm-1", "otcfm-2"]
    # A selection of one run is a list too; a run's own name gives the run.
    assert len(json.loads(flowjobs("status", "otcfm-[1]", "--json").stdout)) == 1
    assert json.loads(flowjobs("status", "otcfm-1", "--json").stdout)["run"] == "otcfm-1"


def test_runs_are_selected_by_how_far_they_are(flowjobs: Command, grid: Path) -> None:
    RunStatus("failed").write(Run(grid, "otcfm-0").status_file)
    ended = subprocess.Popen(["true"])
    ended.wait()
    died = replace(JobInfo.in_foreground(), job_id=str(ended.pid), pid=ended.pid, process="1 1")
    status = RunStatus("running", attempts=[AttemptRecord(1, died, started=now())])
    status.write(Run(grid, "icfm-1").status_file)  # which nobody has noted
    found = json.loads(flowjobs("status", "state=failed", "--json").stdout)
    assert [run["run"] for run in found] == ["icfm-1", "otcfm-0"]
    assert "state=failed is 2 runs: icfm-1, otcfm-0" in flowjobs("show", "state=failed").stderr
    assert "state=new is 4 runs: " in flowjobs("show", "state=new").stderr
    for word, said in (
        ("state=running", "no run is running: 2 failed, 4 new"),
        ("state=faild", "state=: found faild, expected one of finished, .*did you mean failed"),
    ):
        done = flowjobs("status", word)
        assert done.returncode == 2
        assert re.search(said, done.stderr), done.stderr
    with pytest.raises(RunNotFoundError, match="icfm-1 has no log"):
        run_command(["logs", "--failed", "icfm-*"])


def test_of_a_run_that_cannot_be_read_its_state_is_unknown(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(grid, "otcfm-1").config_file.write_text("{")
    for words, said in (
        (
            "show state=failed",
            "no run matches state=failed; otcfm-1 could not be read and may be it",
        ),
        ("logs --failed", "no run of 6 in .* has failed; of 1 run it is unknown"),
    ):
        with pytest.raises(RunNotFoundError, match=said):
            run_command(words.split())
        assert "error: otcfm-1: " in capsys.readouterr().err
    assert run_command(["cancel", "state=failed"]) == 2
    assert capsys.readouterr().out == ""


def test_status_of_a_sweep_says_what_of_it_was_never_submitted(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (grid / "sweeps").mkdir()
    (grid / "sweeps" / "a.runs").write_text("icfm-0\notcfm-1\nlater\n")
    for word in ("a", "sweep=a"):
        run_command(["status", word])
        assert capsys.readouterr().out.endswith("of the sweep, not in the study: later\n")
    run_command(["status", "a", "--json"])
    shown = capsys.readouterr()
    assert [run["run"] for run in json.loads(shown.out)] == ["icfm-0", "otcfm-1"]
    assert shown.err == "of the sweep, not in the study: later\n"


def test_cancel_says_first_what_it_will_touch_and_leaves_what_it_cannot_read(
    flowjobs: Command, grid: Path
) -> None:
    Run(grid, "otcfm-2").config_file.write_text("{")
    done = flowjobs("cancel", "flow=otcfm")
    assert done.stdout.splitlines()[0] == "cancels 2 runs: otcfm-0, otcfm-1"
    assert "error: otcfm-2: " in done.stderr
    assert done.returncode == 2
    cancelled = [name for name in ("otcfm-0", "otcfm-1") if Run(grid, name).cancel_requested()]
    assert len(cancelled) == 2
    assert not any(Run(grid, name).cancel_requested() for name in ("icfm-0", "otcfm-2"))


def test_a_command_for_one_run_takes_no_more(flowjobs: Command, grid: Path) -> None:
    done = flowjobs("logs", "otcfm-*")
    assert (done.returncode, " is 3 runs: otcfm-0, " in done.stderr) == (2, True)
