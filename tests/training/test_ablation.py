"""Every flow, model and augmentation: a run that is interrupted ends with the same bits."""

import itertools
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowjobs.config import (
    BUILT_IN_ARCHS,
    BUILT_IN_FLOWS,
    RestartConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
)
from flowjobs.data.dataset import FlowDataset, load_datasets, write_splits
from flowjobs.errors import ConfigError, LockHeldError, RunInterrupted
from flowjobs.evaluation.sampling import CHUNK
from flowjobs.evaluation.solver import Solver
from flowjobs.field_values import KeyValues
from flowjobs.models.build import build_model
from flowjobs.runs import file_lock
from flowjobs.runs.datasets import pair_files
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.training import FlowTrainer, reflow
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.pinned import with_pinned_files
from flowjobs.training.trainer import Trainer
from tests.training.test_exactness import (
    CONFIG,
    CPU,
    STEPS_PER_EPOCH,
    data,
    interrupt_everywhere,
    train,
)

AUGS = ("none", "noise", "mixup", "dropout")
BASE = replace(CONFIG, epochs=3, arch_args=KeyValues(width=16, depth=1))
OF_FLOW: dict[str, dict[str, Any]] = {
    # A start within what is paired at once, which then is paired again.
    "otcfm": {"ot_batch": 32, "sigma": 0.1},
    "sbcfm": {"ot_batch": 16, "sigma": 0.2},
    "fm": {"sigma": 0.1},
    "reflow": {"reflow_from": "teacher"},
}
PRODUCT = list(itertools.product(BUILT_IN_FLOWS, BUILT_IN_ARCHS, AUGS))
# Each flow once, with another model and augmentation each time.
DIAGONAL = [
    (flow, BUILT_IN_ARCHS[n % len(BUILT_IN_ARCHS)], AUGS[n % len(AUGS)])
    for n, flow in enumerate(BUILT_IN_FLOWS)
]


def interrupt(study: Path, flow: str, arch: str, aug: Any, **options: Any) -> None:
    config = replace(BASE, flow=flow, arch=arch, aug=aug, **OF_FLOW.get(flow, {}), **options)
    if flow == "reflow":
        train(Run(study, "teacher"), replace(BASE, epochs=1))
        config = with_pinned_files(config, study, before=None)  # as a submission does
    interrupt_everywhere(study, config, every=3)


@pytest.mark.parametrize(("flow", "arch", "aug"), DIAGONAL)
def test_interrupted_equals_uninterrupted(study: Path, flow: str, arch: str, aug: str) -> None:
    interrupt(study, flow, arch, aug)


@pytest.mark.long
@pytest.mark.parametrize(("flow", "arch", "aug"), PRODUCT)
def test_so_it_is_with_each_combination(study: Path, flow: str, arch: str, aug: str) -> None:
    interrupt(study, flow, arch, aug)


@pytest.mark.parametrize(
    "options",
    [
        {"time_sampling": "logit-normal", "time_mean": 0.5, "precision": "bf16"},
        {"flow": "otcfm", "source": "source.pt", "data_placement": "loader", "ot_batch": 16},
    ],
)
def test_so_it_is_with_other_times_and_sources(
    study: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.rand(50, 6, generator=torch.Generator().manual_seed(3)), "source.pt")
    interrupt_everywhere(study, replace(BASE, **options), every=3)
    losses = {read_checkpoint(Run(study, name).best)["best_loss"] for name in ("whole", "parts")}
    assert len(losses) == 1


def test_pairs_are_made_once_and_kept(study: Path) -> None:
    interrupt(study, "reflow", "mlp", "none")
    (folder,) = (study / "datasets/pairs").iterdir()
    made = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.pt")}
    assert sorted(made) == ["train.pt", "val.pt"]
    pairs = FlowDataset(folder / "train.pt")
    assert (len(pairs), pairs.shape) == (43, (2, 6))
    Run(study, "teacher").best.unlink()
    parts = Run(study, "parts")
    before = parts.config().training
    asked = replace(before, epochs=4, reflow_from="teacher")
    train(parts, with_pinned_files(asked, study, before))
    assert read_checkpoint(parts.last)["step"] == 4 * STEPS_PER_EPOCH
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.pt")} == made


def test_pairs_of_other_data_or_another_source_are_refused(study: Path) -> None:
    interrupt(study, "reflow", "mlp", "none")
    asked = replace(BASE, flow="reflow", reflow_from="teacher")
    with pytest.raises(ConfigError, match="--normalize: found none, expected columns, as teacher"):
        with_pinned_files(replace(asked, normalize="none"), study, None)
    with pytest.raises(ConfigError, match=r"no run nobody .*teacher"):
        with_pinned_files(replace(asked, reflow_from="nobody"), study, None)
    other = FlowDataset(torch.rand(40, 6)), FlowDataset(torch.rand(20, 6))
    for _ in ("the pairs are there", "they are not"):
        with pytest.raises(ConfigError, match=r"it was trained on other data.*\n  train: 43 rows"):
            FlowTrainer(build_model(asked, 6), asked, *other, CPU, name="other")
        shutil.rmtree(study / "datasets/pairs", ignore_errors=True)
    assert not (study / "datasets/pairs").exists()
    with pytest.raises(RunInterrupted):
        train(Run(study, "unfinished"), replace(BASE, epochs=2), steps=3)
    with pytest.raises(ConfigError, match=r"expected one that is: `.*flowjobs resume unfin"):
        with_pinned_files(replace(asked, reflow_from="unfinished"), study, None)


def teacher_of(study: Path, config: TrainingConfig, parts: tuple[FlowDataset, FlowDataset]) -> Run:
    teacher = Run(study, "teacher")
    teacher.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
    with recording(teacher, JobInfo.in_foreground()) as recorder:
        model = build_model(config, 6)
        Trainer(model, config, *parts, CPU, run=teacher, recorder=recorder).train()
    return teacher


def test_pairs_of_other_data_are_refused_before_a_job_is_submitted(study: Path) -> None:
    for name, seed in (("one", 1), ("other", 2)):
        write_splits(data(60, seed), study, {name: None})
    # Not normalized, the data are all that differs.
    config = replace(BASE, epochs=1, normalize="none", dataset="one")
    one, other = (load_datasets(name, study) for name in ("one", "other"))
    teacher_of(study, config, one)
    model = build_model(config, 6)
    asked = replace(config, flow="reflow", reflow_from="teacher")
    pinned = with_pinned_files(asked, study, None)
    with pytest.raises(ConfigError, match=r"other data.*\n  train: .* then, .* now\n  val: "):
        with_pinned_files(replace(asked, dataset="other"), study, None)
    with pytest.raises(ConfigError, match="--dataset: found moons, expected one, as teacher"):
        with_pinned_files(replace(asked, dataset="moons"), study, None)  # its file is not made yet
    FlowTrainer(model, pinned, *one, CPU, name="student")  # makes the pairs
    with pytest.raises(ConfigError, match="it was trained on other data"):
        FlowTrainer(model, pinned, *other, CPU, name="other")


def test_pairs_that_are_made_survive_an_interruption_and_are_progress(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflow, "SOLVER", Solver("euler", 5))
    parts = data(2 * CHUNK + 50, 1), data(20, 2)
    teacher_of(study, replace(BASE, epochs=1), parts)
    asked = replace(BASE, epochs=1, flow="reflow", reflow_from="teacher")
    config, run = with_pinned_files(asked, study, None), Run(study, "run")
    run.create(RunConfig(config, restarts=RestartConfig(give_up_after=2)))
    folder = pair_files(study, str(config.reflow_from))[0].parent

    def attempt(number: int, calls: int | None) -> None:
        asks = itertools.count(1)
        job = replace(JobInfo.in_foreground(), restart=number)
        with recording(run, job) as recorder:
            Trainer(
                *(build_model(config, 6), config, *parts, CPU),
                run=run,
                recorder=recorder,
                stop_reason=lambda: "preempted" if next(asks) == calls else None,
            )

    for number in range(3):
        with pytest.raises(RunInterrupted):
            attempt(number, calls=8)  # of 5 a chunk: in the one after the one that it makes
    attempt(3, None)
    assert sorted(file.name for file in folder.iterdir()) == [".lock", "train.pt", "val.pt"]
    status = run.status()
    assert [record.prepared for record in status.attempts] == [1, 1, 1, 1]
    made = FlowDataset(folder / "train.pt").data.clone()
    shutil.rmtree(folder)
    attempt(4, None)
    assert torch.equal(FlowDataset(folder / "train.pt").data, made)
    assert len(torch.unique(made[:, 0], dim=0)) == len(parts[0])


def test_the_pairs_of_the_training_part_start_at_rows_of_the_sources(
    study: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(workplace)
    monkeypatch.setattr(reflow, "SOLVER", Solver("euler", 2))
    torch.save(torch.rand(50, 6, generator=torch.Generator().manual_seed(3)), "source.pt")
    Path("straight.py").write_text(
        "from flowjobs.flows.flow import Flow, icfm_path\n"
        "flow = Flow(icfm_path, given_pairs=True)\n"
    )
    base, parts = replace(BASE, epochs=1, source="source.pt"), (data(43, 1), data(20, 2))
    teacher_of(study, base, parts)
    asked = replace(base, flow="straight:flow", reflow_from="teacher")
    config = with_pinned_files(asked, study, None)
    with monkeypatch.context() as script:
        script.setattr(logging.getLogger(), "handlers", [])  # of one that sets up no logging
        FlowTrainer(build_model(config, 6), config, *parts, CPU, name="student")
    assert "makes 43 pairs of teacher, from 0: " in capsys.readouterr().err
    for file, rows in zip(
        pair_files(study, str(config.reflow_from)), load_datasets("source.pt", study), strict=True
    ):
        starts = {tuple(of) for of in FlowDataset(file).data[:, 0].tolist()}
        assert len(starts) == min(len(rows), len(FlowDataset(file))), file.name


def test_who_waits_for_pairs_of_another_run_listens_and_waits_as_long_as_there_are_more(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_lock, "SAY_AFTER_S", 0.05)
    monkeypatch.setattr(reflow, "WAIT_S", 0.2)
    parts = data(43, 1), data(20, 2)
    teacher_of(study, replace(BASE, epochs=1), parts)
    asked = replace(BASE, flow="reflow", reflow_from="teacher")
    config = with_pinned_files(asked, study, None)
    folder = pair_files(study, str(config.reflow_from))[0].parent
    folder.mkdir(parents=True)
    model, asks = build_model(config, 6), itertools.count(1)

    def stop_reason() -> str | None:
        with (folder / "train.partial").open("a") as partial:
            partial.write("more")
        return "told to leave" if next(asks) == 20 else None

    with file_lock.locked(folder / ".lock", 5, "to make them"):
        with pytest.raises(RunInterrupted, match="told to leave"):
            FlowTrainer(model, config, *parts, CPU, name="other", stop_reason=stop_reason)
        with pytest.raises(LockHeldError, match=r"waited 0\.2 s for the pairs of teacher"):
            FlowTrainer(model, config, *parts, CPU, name="other")
