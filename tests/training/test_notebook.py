"""The Python API as a script or a notebook uses it: no job, no command line."""

import io
import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

import flowjobs
from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.default_logging import default_logging
from flowjobs.errors import ConfigError, RunMismatchError
from flowjobs.jobs.cancel import cancel
from flowjobs.models.mlp import MLP
from flowjobs.report.page import html_page
from flowjobs.runs.run import Run
from flowjobs.training import FlowDataset, FlowTrainer
from flowjobs.training.trainer import TrainingResult
from tests.report.test_comparison import compared

SETUP = """
import flowjobs, numpy as np, torch
from flowjobs.errors import ConfigError, RunMismatchError
from flowjobs.training import FlowDataset, FlowTrainer, TrainingConfig

rows = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
rows.flags.writeable = False
train, val = FlowDataset(rows[:160]), FlowDataset(torch.from_numpy(rows[160:].copy()))

class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, width), torch.nn.Linear(width, 4)
    def forward(self, x, t):
        return self.b(self.a(x))

def trainer(width=4, train=train, **options):
    config = TrainingConfig(epochs=options.pop("epochs", 3), batch_size=8)
    torch.manual_seed(0)
    return FlowTrainer(Net(width), config, train, val, device="cpu", **options)
"""


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SETUP + text],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_a_script_sees_progress_and_cannot_fail_anothers_record(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_ENTITY", "the-lab")
    monkeypatch.setenv("HOME", str(study.parent))
    monkeypatch.setenv("FLOWJOBS_STUDY", "~/study")  # as a crontab has it: no shell has read it
    done = run_script(
        "import logging\n"
        "import flowjobs.training.rows as module\n"
        "module.SAY_EVERY_S = 0.0\n"
        "logging.warning('as a library does')\n"  # sets up logging, of warnings alone
        "print(trainer().train()['epochs_run'])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"
    assert done.stderr.count("epoch 3/3  step 60/60  val/loss") == 1
    assert done.stderr.count("epoch 2/3  step 50/60  train/loss") == 1
    folder = study / "runs/mlp-icfm-digits-none"
    record = {path: path.read_bytes() for path in folder.glob("*.json*")}
    waits = Run(study, "waits")
    waits.create(RunConfig())
    waits.add_submission("4711", "slurm", None)
    asked = waits.config_file.read_bytes()
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    done = run_script(
        "other = FlowDataset(rows[:160] * 2)\n"
        "for options in ({'width': 5}, {'epochs': 2}, {'train': other}):\n"
        "    try:\n"
        "        trainer(**options).train()\n"
        "    except RunMismatchError as error:\n"
        "        print('refused', 'name=' in str(error))\n"
        "try:\n"
        "    trainer(name='waits').train()\n"
        "except flowjobs.errors.RunBusyError as error:\n"
        "    print(error)\n"
        "for name in ('/tmp/x', '../x', 'my run'):\n"
        "    try:\n"
        "        trainer(name=name)\n"
        "    except ConfigError as error:\n"
        "        print('refused', repr(name) in str(error))\n"
        "print(trainer(width=5, name='mine').train()['epochs_run'])\n"
        "try:\n"
        "    flowjobs.load('mine')\n"
        "except flowjobs.FlowjobsError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch 3/3  step 60/60  val/loss") == 1
    *others, told = done.stdout.splitlines()
    taken = others.pop(3)
    assert "was submitted as slurm job 4711, which has not trained yet: give this" in taken
    assert waits.config_file.read_bytes() == asked
    shutil.rmtree(waits.folder)
    assert others == ["refused True"] * 6 + ["3"]
    assert told.startswith("mine was trained from Python, with a model that its config does not n")
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == record
    assert (study / "runs/mine/status.json").exists()
    assert {path.name for path in (study / "runs").iterdir()} == {folder.name, "mine"}
    models = compared(study)
    assert models.rows == [("Net (40 parameters)",), ("Net (49 parameters)",)]
    config = json.loads((study / "runs/mine/config.json").read_text())
    assert config["tracking"]["wandb_entity"] == "the-lab"
    assert config["tracking"]["wandb_mode"] == "disabled"


def test_a_run_of_the_command_line_stays_out_of_wandb_in_a_notebook(study: Path) -> None:
    run = Run(study, "mine")
    config = TrainingConfig(epochs=1)
    run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
    rows = FlowDataset(torch.randn(64, 8))
    FlowTrainer(MLP(8, 16), config, rows, rows, device="cpu", name="mine").train()
    assert run.config().tracking.wandb_mode == "disabled"
    assert not run.tracking_file.exists()


def test_a_page_names_no_command_for_what_a_script_trained(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    rows = FlowDataset(torch.randn(64, 8))
    FlowTrainer(MLP(8, 16), TrainingConfig(epochs=1), rows, rows, device="cpu", name="mine").train()
    page = html_page(compared(study), "", "")
    assert "flowjobs submit" not in page
    assert "trained from Python, FlowTrainer(…, name='mine')" in page


def test_an_entity_that_wandb_would_refuse_makes_no_run(study: Path) -> None:
    rows = FlowDataset(torch.randn(64, 8))
    asked = {"name": "mine", "wandb_entity": "my-team/project"}
    trainer = FlowTrainer(MLP(8, 16), TrainingConfig(epochs=1), rows, rows, device="cpu", **asked)
    with pytest.raises(ConfigError, match="--wandb-entity, WANDB_ENTITY: found 'my-team/project'"):
        trainer.train()
    assert not Run(study, "mine").folder.exists()


def test_what_is_given_by_mistake_is_told_and_makes_no_run(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    rows, config = FlowDataset(torch.randn(64, 8)), TrainingConfig(epochs=1)

    def given(**changed: Any) -> dict[str, Any]:
        parts = {"model": MLP(8, 16), "config": config, "device": "auto", "name": "mine"}
        return {**parts, "train_dataset": rows, "val_dataset": rows, **changed}

    for mistake, said in (
        ({"model": MLP}, "model: found the class MLP, expected an nn.Module"),
        ({"model": lambda x, t: x}, "model: found a value of type function, expected"),
        ({"config": RunConfig(config)}, "config: found a value of type RunConfig, expected a Tr"),
        ({"config": {"epochs": 1}}, "config: found a value of type dict, expected a TrainingCon"),
        ({"device": "cuda:99"}, "--device: found 'cuda:99', which cannot be used here"),
        ({"device": None}, "--device: found None, which cannot be used here"),
        ({"name": 7}, "--name: found 7, expected at most 100 letters"),
    ):
        with pytest.raises(ConfigError, match=said):
            FlowTrainer(**given(**mistake)).train()
    assert not study.exists()
    FlowTrainer(**given()).train()
    trained = flowjobs.load("mine", model=MLP(8, 16))
    assert trained.sample(2, steps=1).shape == (2, 8)
    for wrong, said in (
        ({"n": 0}, "n: found 0, expected at least 1"),
        ({"n": 2.5}, "n: found 2.5, expected at least 1"),
        ({"n": 2, "solver": None}, "--solver: found None, expected one of euler, midpoint"),
        ({"n": 2, "steps": 2.5}, "--steps: found 2.5, expected 1 to 1000000"),
        ({"n": 2, "tolerance": "1"}, "--tolerance: found 1, expected more than 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            trained.sample(**wrong)


@pytest.mark.parametrize(
    ("own_level", "handler_level", "shown", "by_ours"),
    [
        (logging.NOTSET, logging.WARNING, ["epoch", "slow"], ["epoch"]),
        (logging.NOTSET, logging.NOTSET, ["epoch", "slow"], []),
        (logging.WARNING, logging.NOTSET, ["slow"], []),
    ],
)
def test_progress_is_shown_once_unless_a_level_is_set_for_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own_level: int,
    handler_level: int,
    shown: list[str],
    by_ours: list[str],
) -> None:
    there = logging.StreamHandler(io.StringIO())
    there.setLevel(handler_level)
    ours = logging.getLogger("flowjobs")
    monkeypatch.setattr(logging.getLogger(), "handlers", [there])
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    ours.setLevel(own_level)
    try:
        with default_logging():
            logging.getLogger("flowjobs.training").info("epoch")
            logging.getLogger("flowjobs.training").warning("slow")
        logging.getLogger("flowjobs.training").info("later")
        assert (ours.level, ours.handlers) == (own_level, [])
    finally:
        ours.setLevel(logging.NOTSET)
    assert capsys.readouterr().err.split() == by_ours
    assert sorted(there.stream.getvalue().split() + by_ours) == shown


CELL = """
import sys, time

def cell(**options):
    try:
        print(trainer(name="mine", **options).train()["epochs_run"], flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)

def hold():
    print("trains", flush=True)
    time.sleep(120)
"""


@contextmanager
def a_notebook(text: str) -> Iterator[tuple["subprocess.Popen[str]", TextIO]]:
    """A process that trains until it is told to stop, and what it prints."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SETUP + CELL + text], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "trains\n"
        try:
            yield process, process.stdout
        finally:
            process.kill()


def test_cancel_ends_the_cell_and_not_the_kernel_and_the_cell_again_takes_it_back(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = Run(study, "mine")
    with a_notebook("cell(stop_reason=hold)\nsys.stdin.readline()\ncell()\n") as (process, said):
        assert f"cancelled process {process.pid} on " in cancel(run)
        assert said.readline() == "interrupted\n"
        assert run.cancel_requested()
        assert (run.status().state, run.status().open_attempt) == ("cancelled", None)
        process.communicate("again\n")
    assert process.returncode == 0
    assert not run.cancel_requested()
    assert [attempt.state for attempt in run.status().attempts] == ["cancelled", "finished"]


def test_cancel_ends_a_script_that_a_shell_has_started_in_the_background(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as a shell has it
    with a_notebook(ignored + "cell(stop_reason=hold)\n") as (process, _):
        cancel(Run(study, "mine"))
        assert process.wait(60) == -signal.SIGTERM


def net_with(act: str) -> type[torch.nn.Module]:
    names: dict[str, Any] = {"torch": torch}
    text = f"""
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(5, 8), torch.nn.Linear(8, 4)

    def forward(self, x, t):
        return self.out(torch.{act}(self.into(torch.cat([x, t[:, None]], dim=1))))
"""
    exec(text, names)
    made: type[torch.nn.Module] = names["Net"]
    return made


def own(model: torch.nn.Module, name: str, **options: Any) -> TrainingResult:
    config = TrainingConfig(epochs=1, batch_size=16, seed=options.pop("seed", 0))
    rows = FlowDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    return FlowTrainer(model, config, rows, rows, device="cpu", name=name, **options).train()


def test_a_model_whose_forward_was_edited_is_not_trained_on_as_the_old_one(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")

    class Broken(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no t")

    with pytest.raises(TypeError):
        own(Broken(4, 4), "mine")  # of it nothing was trained
    first = own(net_with("relu")(), "mine")
    assert own(net_with("relu")(), "mine")["best_val_loss"] == first["best_val_loss"]
    with pytest.raises(RunMismatchError, match=r"last.pt was trained with other code of Net") as at:
        own(net_with("tanh")(), "mine")
    assert "give this one a name of its own, FlowTrainer(…, name=…)" in str(at.value)
    path = str(Run(study, "mine").last)
    assert f"(resume_path={path!r} trains on from it)" in str(at.value)
    assert own(net_with("tanh")(), "new", resume_path=path)["steps"] == first["steps"]


def test_one_model_for_several_runs_is_refused_unless_it_is_new_to_each(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    model = net_with("relu")()
    new = {name: of.clone() for name, of in model.state_dict().items()}
    own(model, "s0")
    own(model, "s0")
    flowjobs.load("s0", model=model)  # which gives it the averaged ones
    with pytest.raises(ConfigError, match=r"has the weights of the run s0, .* init_from='.*best"):
        own(model, "s1", seed=1)
    assert not Run(study, "s1").folder.exists()
    model.load_state_dict(new)
    own(model, "s1", seed=1)
