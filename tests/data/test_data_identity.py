"""Data are known by their content: what changed is refused, what moved is the same."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.data.dataset import load_datasets, write_splits
from flowjobs.errors import (
    CheckpointMismatchError,
    DataError,
    RunInterrupted,
    RunMismatchError,
)
from flowjobs.field_values import KeyValues
from flowjobs.models.build import build_model
from flowjobs.runs.data_file import content_of_file
from flowjobs.runs.run import Run
from flowjobs.training import FlowDataset, FlowTrainer
from flowjobs.training.checkpoint import read_checkpoint, write_checkpoint
from tests.training.same import same
from tests.training.test_trainer import stop_at, train_in

SMALL = KeyValues(width=8, depth=1)
DATA = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def config_of(dataset: str | Path, source: str | Path = "normal") -> TrainingConfig:
    names = {"dataset": str(dataset), "source": str(source)}
    return TrainingConfig(**names, epochs=3, batch_size=32, arch_args=SMALL)


def interrupted(run: Run, dataset: str | Path, source: str | Path = "normal") -> None:
    with pytest.raises(RunInterrupted):
        train_in(run, config_of(dataset, source), stop_reason=stop_at(3))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 400)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another seed's rows": (lambda path: torch.save(torch.randn(30, 4), path), "val: 30 rows"),
    "in another order": (lambda path: torch.save(torch.load(path).flip(0), path), "val: 30 rows"),
    "fewer rows": (lambda path: torch.save(torch.load(path)[:20], path), "20 rows .* now"),
    "other numbers": (lambda path: torch.save(torch.load(path).double(), path), "float64.* now"),
    "that of another split": (
        lambda path: shutil.copy(path.parent.parent / "50" / "train.pt", path),
        "50 rows .* now",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_validation_part_that_changed_between_attempts_is_refused(
    study: Path, change: str
) -> None:
    write_splits(FlowDataset(DATA), study, {"50": 50, "all": None})
    run = Run(study, "run")
    interrupted(run, "all")
    before = run.last.read_bytes()
    change_file, said = CHANGES[change]
    change_file(study / "datasets/splits/all/val.pt")
    with pytest.raises(DataError, match=f"(?s)not those that it has been trained on.*{said}"):
        train_in(run, config_of("all"))
    assert run.last.read_bytes() == before
    # The record is lost, the checkpoint still knows.
    run.data_file.unlink()
    with pytest.raises(CheckpointMismatchError, match=f"(?s)was trained on other data.*{said}"):
        train_in(run, config_of("all"))


def test_a_file_that_was_cut_short_is_named(study: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.npy"
    np.save(path, DATA.numpy())
    run = Run(study, "run")
    interrupted(run, path)
    cut_short(path)
    with pytest.raises(DataError, match=r"mine\.npy has 2928 bytes, expected 3328 .*cut short"):
        train_in(run, config_of(path))


@pytest.mark.parametrize("moved", ["dataset", "source"])
def test_a_run_goes_on_with_data_that_moved(study: Path, tmp_path: Path, moved: str) -> None:
    kept, old = tmp_path / "kept.npy", tmp_path / "old.npy"
    new, other = tmp_path / "new.pt", tmp_path / "other.npy"
    np.save(old, DATA.numpy())
    np.save(kept, DATA.numpy() + 1)

    def paths(of: Path) -> tuple[Path, Path]:
        return (of, kept) if moved == "dataset" else (kept, of)

    whole, run = Run(study, "whole"), Run(study, "run")
    train_in(whole, config_of(*paths(old)))
    interrupted(run, *paths(old))
    (tmp_path / "link.npy").symlink_to(old)
    assert run.create(RunConfig(config_of(*paths(tmp_path / "link.npy")))) == ""
    old.unlink()
    torch.save(DATA, new)
    np.save(other, DATA.flip(0).numpy())
    with pytest.raises(
        RunMismatchError,
        match=rf"(?s)--{moved}: .*old\.npy there, .*other\.npy asked for\n.*now",
    ):
        train_in(run, config_of(*paths(other)))
    assert run.create(RunConfig(config_of(*paths(new)))) == f"the {moved} of run is at {new} now"
    train_in(run, config_of(*paths(new)))
    ended, expected = read_checkpoint(run.last), read_checkpoint(whole.last)
    assert same(ended["model_state_dict"], expected["model_state_dict"])


def test_a_script_resumes_on_data_of_its_own_whatever_its_config_names(study: Path) -> None:
    load_datasets("digits", study)
    train, val = (FlowDataset(part) for part in DATA.split(150))
    config = TrainingConfig(epochs=3, batch_size=32, arch_args=SMALL)

    def trainer(train: FlowDataset = train, **options: Any) -> FlowTrainer:
        return FlowTrainer(build_model(config, 4), config, train, val, "cpu", name="run", **options)

    with pytest.raises(RunInterrupted):
        trainer(stop_reason=stop_at(3)).train()
    with pytest.raises(RunMismatchError, match="trained on other data"):
        trainer(FlowDataset(DATA[:150] * 2)).train()
    trainer().train()


def test_a_normalization_that_was_rounded_otherwise_is_no_other_data(
    study: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.npy"
    np.save(path, DATA.double().numpy())
    run = Run(study, "run")
    interrupted(run, path)
    payload = read_checkpoint(run.last)
    stats = payload["normalization_stats"]
    stats["mean"] = stats["mean"].nextafter(torch.tensor(9.0, dtype=torch.float64))
    write_checkpoint(run.last, payload)
    train_in(run, config_of(path))
    assert not list(run.checkpoints.glob("*.mismatched-*"))


def test_a_run_that_had_not_trained_takes_the_data_as_they_are(study: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    run = Run(study, "run")
    for number in (1, 2):
        torch.save(DATA * number, path)
        if number == 1:
            config = TrainingConfig(dataset=str(path), arch="nowhere:Net")
            with pytest.raises(Exception, match="no module nowhere"):
                train_in(run, config)
    train_in(run, config_of(path))


@pytest.mark.parametrize("placement", ["device", "loader"])
@pytest.mark.parametrize("large", [True, False])
def test_data_that_change_under_a_running_attempt(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, large: bool
) -> None:
    if large:
        monkeypatch.setattr("flowjobs.data.dataset.LARGE_BYTES", 0)
    path = tmp_path / "mine.npy"
    np.save(path, DATA.numpy())
    steps = iter(range(1000))
    config = TrainingConfig(
        dataset=str(path),
        epochs=3,
        batch_size=32,
        arch_args=SMALL,
        data_placement=placement,  # type: ignore[arg-type]
        num_workers=0,
    )
    changes = {2: path.touch, 4: lambda: np.lib.format.open_memmap(path, "r+")[:].fill(1)}

    def change() -> None:
        changes.get(next(steps), lambda: None)()

    run = Run(study, "run")
    if large:  # also where training is resident: validation reads the file at each epoch
        with pytest.raises(DataError, match=r"mine\.npy has changed while it was trained on"):
            train_in(run, config, stop_reason=change)
        return
    changes[5] = lambda: cut_short(path)
    train_in(run, config, stop_reason=change)  # of what it read at its start


def test_a_large_file_is_known_by_blocks_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowjobs.runs.data_file.WHOLE_DIGEST_BYTES", 1024**2)
    path = tmp_path / "large.npy"
    data = torch.randn(70_000, 8)
    versions = [data, data.flip(0), data[:-1], torch.cat([data[1:], data[:1]]), data * 2]
    digests = set()
    for version in versions:
        np.save(path, version.numpy())
        content = content_of_file(path)
        assert content == FlowDataset(version).content  # memory and file alike
        digests.add(content)
    assert len(digests) == len(versions)


def test_the_order_in_the_file_is_no_part_of_what_data_are(tmp_path: Path) -> None:
    data = torch.randn(70, 8)
    content = FlowDataset(data).content
    np.save(tmp_path / "columns.npy", np.asfortranarray(data.numpy()))
    torch.save(data.T.contiguous().T, tmp_path / "columns.pt")
    torch.save(data.bfloat16().T.contiguous().T, tmp_path / "bfloat16.pt")
    for name in ("columns.npy", "columns.pt"):
        assert content_of_file(tmp_path / name) == content == FlowDataset(tmp_path / name).content
    assert content_of_file(tmp_path / "bfloat16.pt") == FlowDataset(data.bfloat16()).content
