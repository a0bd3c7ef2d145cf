"""flowjobs evaluate, and the evaluation at the end of every run."""

import importlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flowjobs as package
from flowjobs.cli.defaults import load_defaults
from flowjobs.cli.evaluate import Evaluate
from flowjobs.cli.evaluation_table import in_a_line, print_evaluation
from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import MeasuringInterrupted
from flowjobs.evaluation import evaluate as evaluation
from flowjobs.jobs.signals import StopSignals
from flowjobs.runs.code import import_from_snapshot
from flowjobs.runs.datasets import split_files
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.tracking.page import summary_of
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.ranks import single_process
from flowjobs.training.run_training import run_training
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.training.same import same

SMALL = {"width": 16, "depth": 1}
QUICK = ("--epochs", "1", "--arch-args", "width=16", "depth=1", "--wandb-mode", "disabled")


def test_a_run_is_evaluated_at_its_end_and_when_asked(
    flowjobs: Command,
    study: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    done = flowjobs("submit", *QUICK, "--name", "a", "--cluster", "local")
    assert done.returncode == 0, done.stderr
    run = Run(study, "a")
    found = json.loads(run.evaluation_file.read_text())
    assert (found["n"], found["repeats"], found["step"]) == (256, 2, 23)
    of = found["measures"]["sliced_wasserstein"]
    assert f"wasserstein {of['value']:.3f} (real data {of['floor']:.3f})" in done.stdout

    options = ("-n", "60", "--repeats", "1", "--steps", "5")
    done = flowjobs("evaluate", "a", "--json", *options)
    assert done.returncode == 0, done.stderr
    assert "a: measured in another way before; the report compares by these" in done.stderr
    asked = json.loads(done.stdout)
    assert asked == json.loads(run.evaluation_file.read_text())
    assert (asked["n"], asked["nfe"]) == (60, 10)
    assert asked["measures"].keys() - found["measures"].keys() == {"c2st"}
    assert asked["measures"]["frechet"]["std"] is None
    print_evaluation(asked)
    shown = capsys.readouterr().out
    assert "a, step 23: 60 samples (midpoint, 5 steps, 10 network calls)" in shown
    named = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert named >= {*asked["measures"], *asked["by_nfe"]} - {"dopri5"}
    calls = next(line for line in shown.splitlines() if "network calls  " in line)
    assert calls.split()[2:] == [*asked["by_nfe"]["dopri5"]]

    before = run.evaluation_file.read_bytes()
    for arguments, said in (
        (("a", "-n", "271"), "-n: found 271, expected at most 270"),
        (("a", "--nfe", "0"), "--nfe: found 0, expected 1 to 1000000"),
        (("a", "--nfe", f"{10**20}"), f"--nfe: found {10**20}, expected 1 to 1000000"),
        (("b",), "no run, sweep or group b in"),
        ((), "found no run"),
    ):
        refused = flowjobs("evaluate", *arguments)
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
        assert said in refused.stderr
    run.best.unlink()
    gone = flowjobs("evaluate", "a")
    assert (gone.returncode, f"a has no {run.best}" in gone.stderr) == (2, True)
    assert run.evaluation_file.read_bytes() == before


def test_runs_of_one_dataset_are_measured_by_the_same_rows(flowjobs: Command, study: Path) -> None:
    sweep = ("--seed", "0", "1", "--parallel", "1", "--cluster", "local", "--evaluate", "False")
    assert flowjobs("sweep", *QUICK, *sweep).returncode == 0
    names = [f"mlp-icfm-digits-none-seed{seed}" for seed in (0, 1)]
    Run(study, "never").create(RunConfig(TrainingConfig()))
    options = ("-n", "60", "--repeats", "1", "--steps", "5", "--nfe", "--json")
    done = flowjobs("evaluate", "ablation", "never", *options)
    assert done.returncode == 2
    assert "error: never: " in done.stderr
    found = json.loads(done.stdout)
    assert [of["name"] for of in found] == names
    assert (found[0]["by_nfe"], found[0]["nfe_of_dopri5"]) == ({}, None)
    floors = [{name: m["floor"] for name, m in of["measures"].items()} for of in found]
    assert floors[0] == floors[1]
    alone = flowjobs("evaluate", names[1], *options)
    assert json.loads(alone.stdout) == found[1]


def test_each_run_is_measured_and_loaded_with_its_own_code(
    flowjobs: Command, study: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = "import torch\nclass Net(torch.nn.Linear):\n"
    net += "    def __init__(self, dim):\n        super().__init__(dim, dim)\n"
    net += "    def forward(self, x, t):\n        return {} * super().forward(x)\n"
    options = ("--arch", "nets:Net", "--epochs", "1", "--wandb-mode", "disabled", "--no-evaluate")
    for name, factor in (("one", 1), ("hundred", 100)):
        (workplace / "nets.py").write_text(net.format(factor))
        done = flowjobs("submit", *options, "--name", name, "--cluster", "local")
        assert done.returncode == 0, done.stderr
    quick = ("-n", "20", "--repeats", "1", "--steps", "2", "--nfe", "--json")
    together = json.loads(flowjobs("evaluate", "one", "hundred", *quick).stdout)
    assert together[1] == json.loads(flowjobs("evaluate", "hundred", *quick).stdout)

    # A notebook has another version and keeps it, as a job does that takes another run's pairs.
    (workplace / "nets.py").write_text("VERSION = 3\n")
    monkeypatch.syspath_prepend(workplace)
    x, t = torch.ones(1, 64), torch.zeros(1)
    for of_job in (False, True):
        if of_job:
            import_from_snapshot(Run(study, "one"))
            del sys.modules["nets"]
        module, path = importlib.import_module("nets"), [*sys.path]
        assert hasattr(module, "VERSION") is not of_job
        for name, factor in (("one", 1), ("hundred", 100), ("one", 1)):
            model = package.load(name, study).model
            expected = torch.nn.functional.linear(x, model.weight, model.bias)
            assert torch.equal(model(x, t), factor * expected)
            assert (sys.path, sys.modules["nets"]) == (path, module)
    del sys.modules["nets"]


def trained(run: Run, config: TrainingConfig, stop_reason: Callable[[], str | None]) -> None:
    run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
    with recording(run, JobInfo.in_foreground()) as recorder:
        run_training(run, recorder, single_process(torch.device("cpu")), stop_reason)


def test_runs_of_two_studies_have_their_own_floors_and_a_model_that_raises_stops_no_other(
    study: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = "import torch\nclass Net(torch.nn.Linear):\n"
    net += "    def __init__(self, dim):\n        super().__init__(dim, dim)\n"
    net += "    def forward(self, x, t):\n        if len(x) > 100:\n"
    net += "            raise RuntimeError('out of memory')\n        return super().forward(x)\n"
    net += "class Exits(Net):\n    def forward(self, x, t):\n        if len(x) > 100:\n"
    net += "            exit(0)\n        return super().forward(x, t)\n"
    (workplace / "raises.py").write_text(net)
    monkeypatch.syspath_prepend(workplace)
    models = {"raises": "raises:Net", "exits": "raises:Exits"}
    runs = [*(Run(study, name) for name in ("a", *models)), Run(study.with_name("there"), "b")]
    for run in runs:
        for number, file in enumerate(split_files(run.study, "5k")):
            file.parent.mkdir(parents=True, exist_ok=True)
            scale = 1 if run.study == study else 100
            torch.save(scale * torch.randn(64, 2, generator=torch.manual_seed(number)), file)
        arch, arguments = models.get(run.name, "mlp"), {} if run.name in models else SMALL
        options = {"arch": arch, "arch_args": arguments, "dataset": "5k", "evaluate": False}
        trained(run, TrainingConfig(epochs=1, batch_size=8, **options), lambda: None)

    def measured(*names: str) -> tuple[int, list[dict[str, Any]]]:
        command = Evaluate(names=names, n=20, repeats=1, steps=2, nfe=(), json=True)
        return command.run(load_defaults()), json.loads(capsys.readouterr().out)

    others = ("study/runs/raises", "study/runs/exits", "there/runs/b")
    code, together = measured("study/runs/a", *others)
    assert (code, [of["name"] for of in together]) == (1, ["a", "b"])
    assert together[1] == measured("there/runs/b", "there/runs/b")[1][0]
    floors = [of["measures"]["sliced_wasserstein"]["floor"] for of in together]
    assert floors[1] == pytest.approx(100 * floors[0])
    # What cannot be written is shown, and the next one measured.
    runs[0].evaluation_file.unlink()
    runs[0].evaluation_file.mkdir()
    assert measured("study/runs/a", "there/runs/b") == (2, together)
    with pytest.raises(RuntimeError, match="out of memory"):
        measured("study/runs/raises")


def test_the_measures_are_in_wandbs_summary(study: Path) -> None:
    run = Run(study, "a")
    trained(run, TrainingConfig(epochs=1, arch_args=SMALL), lambda: None)
    found = json.loads(run.evaluation_file.read_text())
    summary = summary_of(run)
    assert summary["eval/n"] == found["n"]
    for name, of in found["measures"].items():
        assert summary[f"eval/{name}"] == of["value"]
        assert summary[f"eval/{name}/floor"] == of["floor"]
    assert summary["best_val_loss"] == run.status().best_val_loss
    assert summary["parameters"] == run.status().parameters


def test_no_evaluate_leaves_it_out_and_changes_no_bit(study: Path) -> None:
    with_it, without = Run(study, "with"), Run(study, "without")
    trained(with_it, TrainingConfig(epochs=1, arch_args=SMALL), lambda: None)
    trained(without, TrainingConfig(epochs=1, arch_args=SMALL, evaluate=False), lambda: None)
    assert (with_it.evaluation_file.exists(), without.evaluation_file.exists()) == (True, False)
    assert with_it.config().training.signature == without.config().training.signature
    for name in ("best", "last"):
        payloads = [read_checkpoint(getattr(run, name)) for run in (with_it, without)]
        for payload in payloads:
            del payload["config"]
        assert same(*payloads)


def test_a_signal_while_measuring_ends_it_and_loses_nothing(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, asked = evaluation.measures.mmd, []

    def preempted_in(samples: torch.Tensor, reference: torch.Tensor) -> float:
        asked.append(1)
        signal.raise_signal(signal.SIGUSR2)
        return measure(samples, reference)

    run = Run(study, "a")
    trained(run, TrainingConfig(epochs=1, arch_args=SMALL), lambda: None)
    at_epoch_1 = run.evaluation_file.read_bytes()
    with monkeypatch.context() as patched, StopSignals() as signals:
        patched.setattr(evaluation.measures, "mmd", preempted_in)
        with pytest.raises(MeasuringInterrupted):
            trained(run, TrainingConfig(epochs=2, arch_args=SMALL), signals.reason)
    assert len(asked) == 2  # the value and its floor: then it was asked
    assert run.status().state == "preempted"
    assert run.samples_picture.exists()
    assert not run.evaluation_file.exists()
    # Where it stands all the same, it is not taken for what the run is worth.
    run.evaluation_file.write_bytes(at_epoch_1)
    assert in_a_line(run) == ""

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("flowjobs.training.run_training.draw_samples", full)
    trained(run, TrainingConfig(epochs=3, arch_args=SMALL), lambda: None)
    assert run.finished()
    assert not run.samples_picture.exists()
    assert not run.evaluation_file.exists()


TOLD = """
import signal
from pathlib import Path
import torch
class Net(torch.nn.Linear):
    def __init__(self, dim, told, times):
        super().__init__(dim, dim)
        self.told, self.times = told, times
    def forward(self, x, t):
        if len(x) == 256 and len(Path("calls").read_text()) < self.times:  # it is sampled
            Path("calls").open("a").write("x")
            signal.raise_signal(signal.Signals[self.told])
        return super().forward(x)
"""


@pytest.mark.parametrize(
    ("told", "times", "attempts"),
    [
        ("SIGUSR2", 1, [("preempted", "time limit"), ("finished", "")]),
        ("SIGUSR2", 1000, [("preempted", "time limit"), ("finished", "")]),
        ("SIGTERM", 1, [("finished", "")]),  # by `kill`: nobody starts it again
    ],
)
def test_a_job_that_is_told_to_leave_while_measuring_measures_at_its_next_start_but_not_for_ever(
    flowjobs: Command,
    study: Path,
    workplace: Path,
    told: str,
    times: int,
    attempts: list[tuple[str, str]],
) -> None:
    (workplace / "is_told.py").write_text(TOLD)
    (workplace / "calls").touch()
    options = ("--arch", "is_told:Net", "--arch-args", f"told={told}", f"times={times}")
    local = ("--name", "a", "--cluster", "local", "--no-follow")
    done = flowjobs("submit", *QUICK[:2], *QUICK[-2:], *options, *local)
    assert done.returncode == 0, done.stderr
    run = Run(study, "a")
    wait_until(run.finished, "its end", 600, lambda: str(run.status()))
    assert [(each.state, each.kind) for each in run.status().attempts] == attempts
    is_measured = (told, times) == ("SIGUSR2", 1)
    assert run.evaluation_file.exists() is is_measured
    said = "".join(log.read_text() for log in run.logs.glob("*.out"))
    assert (f"({told}) while samples were measured: " in said) is not is_measured


class KilledHere(BaseException):
    """What no handler stops, as SIGKILL."""


def test_a_run_killed_while_measuring_measures_again_and_trains_nothing_again(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> float:
        raise KilledHere

    run, config = Run(study, "a"), TrainingConfig(epochs=1, arch_args=SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(evaluation.measures, "mmd", killed)
        with pytest.raises(KilledHere):
            trained(run, config, lambda: None)
    assert not run.finished()
    rows, last = run.metrics_file.read_bytes(), run.last.read_bytes()
    trained(run, config, lambda: None)
    assert run.finished()
    assert run.evaluation_file.exists()
    assert (run.metrics_file.read_bytes(), run.last.read_bytes()) == (rows, last)


def test_a_measure_that_fails_does_not_fail_the_run(
    study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> float:
        raise ZeroDivisionError("no such number")

    monkeypatch.setattr(evaluation.measures, "frechet", broken)
    run = Run(study, "a")
    trained(run, TrainingConfig(epochs=1, arch_args=SMALL), lambda: None)
    assert run.finished()
    assert "ZeroDivisionError: no such number" in caplog.text
