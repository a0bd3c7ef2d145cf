"""flowjobs sample, and the same from Python."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flowjobs as package
from flowjobs.cli.main import run as command
from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.models.build import build_model
from flowjobs.runs.run import Run
from tests.conftest import Command

SMALL = ("--arch-args", "width=16", "depth=1")
QUICK = ("--epochs", "1", *SMALL, "--wandb-mode", "disabled", "--name", "a")


def test_samples_are_written_and_the_same_from_python(
    flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flowjobs("train", *QUICK).returncode == 0
    done = flowjobs("sample", "a", "-n", "40", "--steps", "7", "--out", "x.npy", "x.pt", "x.png")
    assert done.returncode == 0, done.stderr
    assert "midpoint, 7 steps: 14 network calls (NFE) a sample" in done.stdout
    drawn = np.load("x.npy")
    assert (drawn.shape, drawn.dtype) == ((40, 64), np.float32)
    assert np.array_equal(torch.load("x.pt"), drawn)
    assert 3 < drawn.mean() < 7  # the digits' mean is 4.9, not 0: the normalization is undone
    with Image.open("x.png") as picture:
        assert min(picture.size) > 500
    code = (
        "import sys, flowjobs, numpy as np; assert 'torch' not in sys.modules\n"
        "drawn = flowjobs.load('a').sample(10, steps=7)\n"
        "assert np.array_equal(drawn.numpy(), np.load('x.npy')[:10])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    trained = package.load("a", study)
    assert torch.equal(trained.sample(40, steps=7), torch.from_numpy(drawn))
    assert torch.equal(before[0], torch.get_rng_state())  # a notebook's own numbers are left alone
    assert before[1] == np.random.get_state()[1].tolist()
    assert not trained.model.training
    # The last bits depend on the threads, of which a small model has one, as for the command.
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    with package.load("a", study).on_its_threads():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)

    for device in ("tpu", "cuda:99"):
        with pytest.raises(
            package.FlowjobsError, match=f"--device: found '{device}', which cannot"
        ):
            package.load("a", study, device)

    run = Run(study, "a")
    for arguments, said in (
        (("--out", "x.csv"), "--out: found x.csv, expected a .npy, .pt or .png file"),
        (("--out", "none/x.npy"), "--out none/x.npy: there is no folder none"),
        (("--out", "x.npy", "-n", "0"), "-n: found 0, expected at least 1"),
        (("--out", "x.npy", "--seed", "-1"), "--seed: found -1"),
    ):
        refused = flowjobs("sample", "a", *arguments)
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr
        assert said in refused.stderr
    run.best.rename(run.best.with_name("elsewhere.pt"))
    gone = flowjobs("sample", "a", "--out", "x.npy")
    assert (gone.returncode, "Traceback" in gone.stderr) == (2, False)
    assert f"a has no {run.best}: the run is finished, so that it was moved" in gone.stderr
    assert np.array_equal(np.load("x.npy"), drawn)


def test_samples_never_replace_what_the_run_needs(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(dataset="rows.npy", source="starts.npy")))
    for file in (Path("rows.npy"), Path("starts.npy"), run.best):
        file.write_text(str(file))
    Path("other-name.npy").symlink_to("rows.npy")
    for needed in ("rows.npy", "starts.npy", "other-name.npy", str(run.best)):
        kept = Path(needed).read_bytes()
        with pytest.raises(package.FlowjobsError, match="a needs this file, which samples would"):
            command(["sample", "a", "-n", "3", "--out", "x.npy", needed])
        assert Path(needed).read_bytes() == kept
    Path("x.npy").touch()  # other files may be replaced: it gets as far as the damaged checkpoint
    with pytest.raises(package.FlowjobsError, match=r"best\.pt"):
        command(["sample", "a", "-n", "3", "--out", "x.npy"])


def test_a_run_that_is_not_there(flowjobs: Command, workplace: Path) -> None:
    done = flowjobs("sample", "b", "--out", "x.npy")
    assert (done.returncode, "no run, sweep or group b in" in done.stderr) == (2, True)
    with pytest.raises(package.FlowjobsError, match="no run b in"):
        package.load("b")


def test_a_model_of_a_notebook_is_given(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowjobs.training import FlowDataset, FlowTrainer, TrainingConfig

    rows = FlowDataset(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
    config = TrainingConfig(epochs=1)
    FlowTrainer(Scale(), config, rows, rows, "cpu", name="mine").train()
    drawn = package.load("mine", model=Scale()).sample(2000)
    assert torch.allclose(drawn.mean(0), rows.data.mean(0), atol=0.15)
    with pytest.raises(package.FlowjobsError, match=r"trained from Python, with a model .*model=…"):
        package.load("mine")

    # Its data are not those that its config names by default, of which a picture would be.
    plain = FlowTrainer(build_model(config, 3), config, rows, rows, "cpu", name="plain")
    plain.train()
    for arguments in (["sample", "plain", "--out", "x.png"], ["evaluate", "plain"]):
        with pytest.raises(package.FlowjobsError, match="the data of plain are not those that it"):
            command(arguments)
    assert command(["sample", "plain", "--out", "x.npy"]) == 0
    assert "starts " not in capsys.readouterr().out

    torch.save(torch.rand(40, 3), "rows.pt")
    of_rows = TrainingConfig(epochs=1, source="rows.pt")
    FlowTrainer(build_model(of_rows, 3), of_rows, rows, rows, "cpu", name="from-rows").train()
    for n, said in (("7", True), ("6", False)):
        assert command(["sample", "from-rows", "--out", "x.npy", "-n", n]) == 0
        found = "starts    6 held-out rows of --source rows.pt, some more than once"
        assert (found in capsys.readouterr().out) is said


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.rate * x
