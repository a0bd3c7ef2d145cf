"""What can be known at submit is said at submit: exit code 2, nothing left behind, no torch."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.data.dataset import load_datasets, write_splits
from flowjobs.errors import DataError
from flowjobs.models.mlp import MLP
from flowjobs.models.size import checkpoint_bytes_of
from flowjobs.runs.datasets import check_data, training_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus, State
from flowjobs.training import FlowDataset, FlowTrainer
from tests.conftest import Command

# Imports torch where it is imported; submit must not.
SUBMIT = """
import sys
from flowjobs.cli import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
"""


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SUBMIT, "submit", "--cluster", "local", *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--arch-args", "widht=64"), "unexpected keyword argument 'widht'; did you mean width"),
        (("--arch", "my_models:WidNet"), r"my_models\.py has no WidNet; did you mean WideNet\?"),
        (("--arch", "my_models:WideNet", "--params", "2M"), "no argument width .*WideNet takes"),
        (("--arch", "dit", "--params", "17k"), r"the nearest are .*k \(--width 4\) and "),
        (("--arch-args", "dropout=1.5"), "--arch-args dropout: found 1.5, expected at least 0"),
        (("--time-mean", "0.5"), "--time-mean: found 0.5 with --time-sampling uniform, .* no use"),
        (("--dataset", "pictures.npy"), r"mlp is for vectors, .*pictures.npy .*\(3, 2, 2\)"),
        (
            ("--dataset", "three.npy", "--source", "pictures.npy"),
            r"--source .*pictures\.npy has rows of shape \(3, 2, 2\), expected \(3,\), as the",
        ),
        (
            ("--batch-size", "65", "--gpus-per-node", "2", "--dry-run"),
            "--batch-size: 65 rows per step cannot be shared equally by 2 ranks",
        ),
        (
            ("--dataset", "nan.npy"),
            r"nan\.npy: row 7 has a value that is NaN or infinite \(column ",
        ),
    ],
)
def test_a_mistake_submits_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (workplace / "my_models.py").write_text(
        "import torch\n"
        "class WideNet(torch.nn.Module):\n"
        "    def __init__(self, dim): super().__init__()\n"
    )
    data = np.zeros((20, 3), dtype=np.float32)
    data[7, 1] = np.nan
    np.save("nan.npy", data)
    np.save("three.npy", np.nan_to_num(data))
    np.save("pictures.npy", np.zeros((20, 3, 2, 2), dtype=np.float32))
    done = submit(*arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert not (workplace / "study").exists()


def test_an_import_that_is_not_installed_here_is_a_warning(
    workplace: Path, flowjobs: Command
) -> None:
    (workplace / "my_models.py").write_text(
        "import torch\n"
        "import einopsx\n"
        "class WideNet(torch.nn.Module):\n"
        "    def __init__(self, dim): super().__init__()\n"
    )
    said = "warning: my_models.py:2 imports einopsx, which is not installed here\n"
    done = submit("--arch", "my_models:WideNet", "--dry-run")
    assert (done.returncode, said in done.stderr) == (0, True), done.stderr
    seeds = ("--seed", "0", "1", "--name", "s", "--cluster", "local", "--dry-run")
    done = flowjobs("sweep", "--arch", "my_models:WideNet", *seeds)
    assert (done.returncode, done.stderr.count(said)) == (0, 1), done.stderr


def test_data_that_changed_are_refused_at_submit(workplace: Path, study: Path) -> None:
    write_splits(FlowDataset(torch.randn(40, 2)), study, {"mine": None})
    run = Run(study, "run")
    run.create(RunConfig(TrainingConfig(dataset="mine")))
    parts = [FlowDataset(study / f"datasets/splits/mine/{part}.pt") for part in ("train", "val")]
    run.take_data(dict(zip(("train", "val"), (part.content for part in parts), strict=True)))
    run.last.touch()  # it has work to lose
    write_splits(FlowDataset(torch.randn(40, 2)), study, {"mine": None}, overwrite=True)
    said = "the data of run are not those that it has been trained on:\n  train: "
    done = submit("--dataset", "mine", "--name", "run")
    assert (done.returncode, said in done.stderr) == (2, True)
    # Finished, it needs them again to be trained for longer.
    epochs = TrainingConfig().epochs
    RunStatus("finished", epoch=epochs, epochs=epochs).write(run.status_file)
    run.best.touch()
    longer = submit("--dataset", "mine", "--name", "run", "--epochs", str(epochs + 1))
    assert (longer.returncode, said in longer.stderr) == (2, True)
    assert "run is finished" in submit("--dataset", "mine", "--name", "run").stdout


def widths_that_differ(folder: Path) -> None:
    torch.save(torch.randn(9, 3), folder / "train.pt")
    torch.save(torch.randn(9, 2), folder / "val.pt")


def a_late_nan(folder: Path) -> None:
    data = torch.randn(300, 500).to(torch.bfloat16)
    data[250, 499] = -torch.inf
    torch.save(data, folder / "mine.pt")


def nan_column_by_column(folder: Path) -> None:
    data = np.zeros((300, 20), dtype=np.float32)
    data[[250, 7, 9], [0, 19, 1]] = np.nan
    np.save(folder / "mine.npy", np.asfortranarray(data))  # as of a DataFrame


def nan_in_a_permuted_tensor(folder: Path) -> None:
    data = torch.zeros(300, 2, 3, 4, dtype=torch.bfloat16).permute(2, 0, 3, 1)
    data[1, 250, 3, 0] = torch.nan
    torch.save(data, folder / "mine.pt")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "widths": (
        widths_that_differ,
        r"train\.pt has rows of shape \(3,\), .*val\.pt of shape \(2,\)",
    ),
    "bfloat16": (a_late_nan, "mine.pt: row 250 has a value"),
    "column by column": (
        nan_column_by_column,
        r"mine.npy: row 7 has a value .* \(column 19\); 3 rows have one$",
    ),
    "permuted": (
        nan_in_a_permuted_tensor,
        rf"mine.pt: row 1 has a value .* \(column {250 * 4 * 2 + 3 * 2}\); no other row has one$",
    ),
    "columns cut short": (
        lambda at: (
            np.save(at / "mine.npy", np.asfortranarray(np.eye(9))),
            os.truncate(at / "mine.npy", 300),
        ),
        "cut short",
    ),
    "one row": (lambda at: torch.save(torch.zeros(1, 3), at / "mine.pt"), "1 row, expected at"),
    "a row for each part": (
        lambda at: torch.save(torch.randn(2, 3), at / "mine.pt"),
        "2 rows, expected at least 3",
    ),
    "an array": (lambda at: torch.save(np.eye(9), at / "mine.pt"), "a numpy array, .*torch.save"),
    "a link": (lambda at: (at / "mine.pt").symlink_to("gone"), "mine.pt is a link to gone, which"),
    "a folder": (lambda at: (at / "mine.npy").mkdir(), "mine.npy is a folder, expected a file$"),
    "no matrix": (lambda at: np.save(at / "mine.npy", np.zeros(3)), r"has shape \(3,\), expected"),
    "integers": (lambda at: np.save(at / "mine.npy", np.eye(3, dtype=int)), "is of type int64"),
    "a dict": (lambda at: torch.save({"x": torch.eye(3)}, at / "mine.pt"), "holds a dict"),
    "no archive": (lambda at: (at / "mine.pt").write_text("no"), "cannot be read as a .pt file"),
    "cut short": (
        lambda at: (np.save(at / "mine.npy", np.eye(9)), os.truncate(at / "mine.npy", 300)),
        "cut short",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_cannot_be_used_are_known_without_torch(study: Path, case: str) -> None:
    folder = study / "datasets/splits/mine"
    folder.mkdir(parents=True)
    make, said = BAD[case]
    make(folder)
    files = [*folder.glob("mine.*")]
    with pytest.raises(DataError, match=said):
        check_data(str(files[0]) if files else "mine", study)


def rows_beside_nan(at: Path) -> None:
    data = torch.randn(9, 6)
    data[:, 5] = torch.nan
    torch.save(data.T[:3].T, at)  # all of it is in the file


GOOD: dict[str, Callable[[Path], object]] = {
    "torch's old format": lambda at: torch.save(
        torch.randn(9, 3), at, _use_new_zipfile_serialization=False
    ),
    "a part of a tensor": lambda at: torch.save(torch.randn(9, 6)[2:, ::2], at),
    "a part without its NaN": rows_beside_nan,
    "a parameter": lambda at: torch.save(torch.nn.Parameter(torch.randn(9, 3)), at),
}


@pytest.mark.parametrize("case", GOOD)
def test_data_that_can_be_used_are_not_refused(study: Path, tmp_path: Path, case: str) -> None:
    GOOD[case](tmp_path / "mine.pt")
    check_data(str(tmp_path / "mine.pt"), study)
    assert FlowDataset(tmp_path / "mine.pt").dim == 3


@pytest.mark.parametrize("dataset", ["digits", "moons", "split", "rows.npy"])
def test_the_rows_that_train_are_known_at_submit(study: Path, dataset: str) -> None:
    write_splits(FlowDataset(torch.randn(40, 2)), study, {"split": 20})
    np.save("rows.npy", np.random.default_rng(0).random((50, 3)))
    for _ in range(2):  # before and after an embedded one is written
        known = training_rows(dataset, study)
        assert known == len(load_datasets(dataset, study)[0])


def test_a_sweep_knows_whether_ranks_can_share_a_batch(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, flowjobs: Command
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    sweep = ("sweep", "--cluster", "local", "--gpus-per-node", "2", "--name", "s", "--dry-run")
    assert flowjobs(*sweep, "--batch-size", "64", "66").returncode == 0
    done = flowjobs(*sweep, "--batch-size", "64", "65")
    assert (done.returncode, "65 rows per step cannot be shared" in done.stderr) == (2, True)


def test_a_run_of_a_notebooks_model_is_no_jobs(study: Path, flowjobs: Command) -> None:
    run = Run(study, "mine")
    run.create(RunConfig(TrainingConfig(epochs=2)))
    RunStatus("preempted", epochs=2, model="__main__:Net").write(run.status_file)
    run.last.touch()
    for command in (("resume", "mine"), ("submit", "--name", "mine"), ("train", "--name", "mine")):
        done = flowjobs(*command, *(("--cluster", "local") * (command[0] != "train")))
        said = "mine was trained in Python with __main__:Net, and a job would build --arch mlp"
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert run.submissions() == []
    of_a_sweep = Run(study, "mlp-icfm-digits-none")
    of_a_sweep.create(RunConfig(TrainingConfig(epochs=2)))
    of_a_sweep.last.touch()
    many: dict[State, tuple[str, ...]] = {
        "preempted": ("sweep", "--seed", "0", "--epochs", "2", "--name", "s"),
        "failed": ("retry", of_a_sweep.name),
    }
    for state, words in many.items():
        RunStatus(state, epochs=2, model="__main__:Net").write(of_a_sweep.status_file)
        done = flowjobs(*words, "--cluster", "local")
        said = f"error: {of_a_sweep.name} was trained in Python with __main__:Net"
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert "nothing to s" in done.stdout, done.stdout
    assert of_a_sweep.submissions() == []


def test_a_study_begun_below_another_one_says_so(
    flowjobs: Command, workplace: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(command: str, *more: str) -> bool:
        done = flowjobs(command, "--seed", "0", "--cluster", "local", "--dry-run", *more)
        assert done.returncode == 0, done.stderr
        return note in done.stderr

    note = (
        f"note: a new study begins here; there is one in {workplace}: cd there, or --study {study}"
    )
    below = workplace / "notebooks" / "figures"
    (below.parent / "study").mkdir(parents=True)  # of something else
    below.mkdir()
    monkeypatch.chdir(below)
    assert not said("submit")
    Run(study, "a").create(RunConfig())
    assert said("submit")
    assert said("sweep", "--name", "s")
    assert not said("submit", "--study", "other")
    with monkeypatch.context() as home:  # what lies above it is not the person's own
        home.setenv("HOME", str(below.parent))
        assert not said("submit")
    Run(below / "study", "a").create(RunConfig())
    assert not said("submit")
    monkeypatch.chdir(workplace)
    assert not said("submit")


def test_what_wide_models_take_on_disk_is_said_before(
    workplace: Path, study: Path, flowjobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = r"^disk +about {} of checkpoints; \S+ .B are free$"
    wide = ("--cluster", "local", "--width", "1024", "--dry-run")
    shown = flowjobs("submit", *wide).stdout
    assert re.search(said.format(r"4\d\d MB"), shown, re.MULTILINE)
    assert "disk" not in flowjobs("submit", *wide, "--width", "64").stdout
    sweep = flowjobs("sweep", *wide, "--seed", "0", "1", "--name", "s").stdout
    assert re.search(said.format(r"9\d\d MB"), sweep, re.MULTILINE)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = TrainingConfig(epochs=1, width=256, evaluate=False)
    rows = FlowDataset(torch.randn(64, 8))
    FlowTrainer(MLP(8, 256), config, rows, rows, device="cpu", name="one").train()
    expected = checkpoint_bytes_of(config, (8,))
    assert expected is not None
    assert 4 * Run(study, "one").best.stat().st_size == pytest.approx(expected, rel=0.1)
