"""What there is already of the runs of a sweep."""

import json
from pathlib import Path
from typing import Any

import pytest

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.main import run as run_command
from flowjobs.cli.prepare import prepare_run
from flowjobs.cli.prepare_sweep import configs_kept, prepare_sweep
from flowjobs.config import RestartConfig, RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import RunMismatchError
from flowjobs.jobs.run_stages import lacks_best, stages
from flowjobs.runs.run import Run
from flowjobs.sweeps.grid import Point, Sweep
from flowjobs.sweeps.plan import look_at
from flowjobs.sweeps.saved import save_sweep
from flowjobs.training.seal import SealedWriter
from tests.cli.test_many import without_checkpoints
from tests.report.made_up import made_run


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"training": None}, "training: found None, expected an object"),
        ("config.json", {"training": {"epochs": "300"}}, "epochs: found '300', expected"),
        ("config.json", {"training": {"epochs": 0}}, "--epochs: found 0, expected at least 1"),
        ("config.json", {"training": {"init_from": 5}}, "init_from: found 5, expected"),
        ("config.json", {"training": {"dataset": None}}, "dataset: found None, expected"),
        ("config.json", "[" * 100_000, "config.json holds no JSON object"),
        ("config.json", None, "config.json is missing: restore it, or submit the run again"),
        ("status.json", {"epoch": None}, "status.json is damaged (epoch: found None, expected"),
        ("status.json", {"epoch": 0, "epochs": "3"}, "is damaged (epochs: found '3', expected"),
        ("status.json", {"state": "done"}, "status.json is damaged (state: found 'done', expected"),
        ("status.json", "{", "status.json is damaged"),
    ],
)
def test_a_run_whose_files_are_damaged_is_unknown_and_the_others_as_they_are(
    study: Path, file: str, change: dict[str, Any] | str | None, said: str
) -> None:
    damaged, other = (made_run(study, [1.0] * 3, name=f"s{seed}", seed=seed) for seed in (0, 1))
    path = damaged.folder / file
    match change:
        case None:
            path.unlink()
        case str():
            path.write_text(change)
        case _:
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
    asked = {run: RunConfig(TrainingConfig(seed=int(run.name[1:]))) for run in (damaged, other)}
    unknown, finished = look_at(asked, frozenset())
    assert (unknown.stage, finished.stage) == ("unknown", "finished")
    assert said in unknown.why
    assert unknown.why.startswith(str(damaged.folder))


def test_a_damaged_config_keeps_no_sweep_of_a_file_of_weights_from_starting_the_others(
    study: Path, workplace: Path
) -> None:
    weights = workplace / "best.pt"
    with weights.open("wb") as file:
        sealed = SealedWriter(file)
        sealed.write(b"weights\0\0")
        sealed.seal()
    sweep = Sweep(base={"init_from": str(weights)}, grid={"seed": [0, 1]})
    runs, _ = prepare_sweep(Defaults(), study, "s", sweep)
    names = [run.name for run in runs]
    save_sweep(study, "s", sweep, names)
    damaged = next(iter(runs))
    damaged.create(runs[damaged])
    damaged.config_file.write_text("{")
    found = look_at(*prepare_sweep(Defaults(), study, "s", sweep))
    assert [member.stage for member in found] == ["unknown", "new"]
    assert [*configs_kept(Defaults(), study, "s")] == names


@pytest.mark.parametrize(
    ("defaults", "base", "expected"),
    [
        (Defaults(), {}, ["ablation", "rates"]),
        (Defaults({"group": "lab"}), {}, ["ablation", "lab"]),
        (Defaults(), {"group": "widths"}, ["widths", "widths"]),
    ],
)
def test_the_group_of_new_runs_is_the_sweep_and_those_that_are_there_keep_theirs(
    study: Path, defaults: Defaults, base: Point, expected: list[str]
) -> None:
    made_run(study, [1.0], name="mlp-icfm-digits-none-seed0")
    asked = prepare_sweep(defaults, study, "rates", Sweep(base=base, grid={"seed": [0, 1]}))
    members = look_at(*asked)
    assert [member.config.training.group for member in members] == expected
    # And where one of them is submitted by itself.
    run = members[1].run
    run.create(members[1].config)
    parts = (SlurmConfig(), TrackingConfig(), RestartConfig())
    _, alone = prepare_run(Defaults(), study, run.name, TrainingConfig(seed=1), *parts)
    assert alone.training.group == expected[1]


def test_other_data_are_another_config_and_an_older_run_starts_at_noise(study: Path) -> None:
    options = {"dataset": "/a/x.npy", "source": "/a/z.npy"}
    run, older = (
        made_run(study, [1.0] * 3, name="a", **options),
        made_run(study, [1.0] * 3, name="b"),
    )
    config = json.loads(older.config_file.read_text())
    del config["training"]["source"]
    older.config_file.write_text(json.dumps(config))
    (study / "sweeps").mkdir()
    (study / "sweeps" / "first.runs").write_text("a\n")
    asked = {older: RunConfig(TrainingConfig())}
    assert [member.stage for member in look_at(asked, frozenset())] == ["finished"]
    for field, other in (("dataset", "/b/x.npy"), ("source", "/b/z.npy"), ("source", "moons")):
        asked |= {run: RunConfig(TrainingConfig(**{**options, field: other}))}  # type: ignore[arg-type]
        line = f"  --{field}: {options[field]} there, {other} asked for"
        said = f"config .of the sweep first.:\na:\n{line}\nask for"
        with pytest.raises(RunMismatchError, match=said):
            look_at(asked, frozenset())


def test_a_new_run_that_the_study_has_under_another_name_is_said(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(study, [1.0], name="mlp-icfm-digits-none", epochs=200)
    made_run(study, [1.0], name="shorter", seed=1)
    made_run(study, [1.0], name="other-data", seed=1, epochs=200, dataset="5k")
    made_run(study, [1.0], name="other-rate", seed=1, epochs=200, lr=0.1)
    made_run(study, [1.0], name="damaged", seed=1).config_file.write_text("{")
    assert run_command(["sweep", "--seed", "0", "1", "--cluster", "local", "--dry-run"]) == 0
    _, _, found = capsys.readouterr().out.partition("new        2\n")
    same = "mlp-icfm-digits-none-seed0 as mlp-icfm-digits-none (finished)"
    assert found.splitlines()[0].strip() == f"there already: {same}"


def test_a_run_whose_checkpoints_are_gone_has_failed_unless_their_disk_is_away(study: Path) -> None:
    run = without_checkpoints(study, "a")

    def found() -> tuple[str, str]:
        member = stages({run: run.config()})[run]
        return member.stage, member.why

    assert found() == ("failed", "checkpoints gone")
    run.request_cancel()
    assert found() == ("cancelled", "checkpoints gone")
    run.clear_cancel()
    (study / "checkpoints").rename("scratch")
    stage, why = found()
    assert (stage, "none is left" in why) == ("unknown", True), why
    run.checkpoints.parent.mkdir()
    run.checkpoints.symlink_to(Path("unmounted").absolute())
    assert found()[0] == "unknown"


def patient_for_five(study: Path, name: str, epochs_done: int, **options: Any) -> Run:
    """A run of 10 epochs and a patience of 5, of which so many are done, each the best so far."""
    losses = options.pop("losses", [9.0 - epoch for epoch in range(epochs_done)])
    run = made_run(study, losses, name=name, epochs=10, patience=5, **options)
    status = run.status()
    status.patience = 5
    status.write(run.status_file)
    run.last.touch()
    run.best.touch()
    return run


def test_what_ran_out_of_patience_is_finished_and_the_others_are_extended(study: Path) -> None:
    whole = patient_for_five(study, "whole", 10)
    early = patient_for_five(study, "early", 6, losses=[1.0] * 6)
    # Killed before it could say that it had finished.
    killed = patient_for_five(study, "killed", 6, losses=[1.0] * 6, state="preempted")
    asked = {run: RunConfig(TrainingConfig(epochs=20)) for run in (whole, early, killed)}
    members = look_at(asked, frozenset({"epochs"}))
    assert [member.stage for member in members] == ["to resume", "finished", "to resume"]
    assert members[1].why.startswith(
        "early ran out of patience, at epoch 6 of 10: with --epochs 20"
    )
    assert [member.config.training.epochs for member in members] == [20, 20, 10]
    for member in (members[0], members[2]):  # as their submission does
        member.run.create(member.config)
    # With more patience all of them train on.
    asked = {run: RunConfig(TrainingConfig(epochs=20, patience=7)) for run in asked}
    stages_found = [member.stage for member in look_at(asked, frozenset({"epochs", "patience"}))]
    assert stages_found == ["to resume"] * 3


def test_a_finished_run_whose_best_is_known_to_be_gone_is_named(study: Path) -> None:
    run = made_run(study, [1.0] * 3, name="a")

    def found() -> bool:
        (member,) = look_at({run: RunConfig(TrainingConfig(epochs=3))}, frozenset())
        assert member.stage == "finished"
        return lacks_best(member.run)

    run.last.touch()
    assert found()
    run.best.symlink_to(run.best)  # as a disk that does not answer
    assert not found()
    run.best.unlink()
    (study / "checkpoints").rename("scratch")
    assert not found()
    run.checkpoints.parent.mkdir()
    run.checkpoints.symlink_to(Path("unmounted").absolute())
    assert not found()
    run.checkpoints.unlink()
    run.checkpoints.mkdir()
    run.best.touch()
    assert not found()
