"""The runs that a sweep has got before, when it is asked for more."""

from pathlib import Path

import pytest

from flowjobs.cli.main import parse
from flowjobs.cli.main import run as run_command
from flowjobs.config import TrainingConfig
from flowjobs.sweeps.grid import Sweep
from flowjobs.sweeps.saved import names_of_runs, read_saved, save_sweep
from tests.report.made_up import made_run


@pytest.mark.parametrize(
    ("there", "asked", "expected"),
    [
        # The run that is as long; none that is longer passes for one of 50 epochs, and none is
        # trained on where another is asked for beside it.
        ([200], [50, 200], ["new-50", "old-200"]),
        ([50], [100, 50], ["new-100", "old-50"]),
        ([50], [100, 200], ["new-100", "new-200"]),
        ([50, 200], [200, 50, 400], ["old-200", "old-50", "new-400"]),
        # The same run, to be longer.
        ([50], [100], ["old-50"]),
    ],
)
def test_a_run_keeps_its_name_where_a_sweep_has_several_lengths(
    study: Path, there: list[int], asked: list[int], expected: list[str]
) -> None:
    for epochs in there:
        made_run(study, [1.0], name=f"old-{epochs}", epochs=epochs)
    save_sweep(study, "m", Sweep(), [f"old-{epochs}" for epochs in there])
    configs = [TrainingConfig(epochs=epochs) for epochs in asked]
    assert names_of_runs(study, "m", configs, [f"new-{epochs}" for epochs in asked]) == expected


def test_a_run_with_weights_of_another_keeps_its_name(study: Path) -> None:
    made_run(study, [1.0], name="old", init_from=f"/s/a/best.pt@sha256:{'0' * 64}")
    save_sweep(study, "m", Sweep(), ["old"])
    configs = [TrainingConfig(init_from=f"/s/{name}/best.pt") for name in "ab"]
    assert names_of_runs(study, "m", configs, ["new-a", "new-b"]) == ["old", "new-b"]


def test_a_file_that_a_flag_names_is_the_same_when_the_sweep_is_asked_for_again(
    study: Path, workplace: Path
) -> None:
    given = {"init_from": ["a/best.pt", "b/best.pt"], "dataset": ["x.npy"], "source": ["z.npy"]}
    words = [
        word for name, values in given.items() for word in ("--" + name.replace("_", "-"), *values)
    ]
    command, defaults = parse(["sweep", "--name", "m", *words])
    _, asked = command._asked(study, defaults)
    save_sweep(study, "m", asked, [])
    assert read_saved(study, "m") == asked
    files = {name: [str(workplace / value) for value in values] for name, values in given.items()}
    assert asked.grid == {"init_from": files["init_from"]}
    assert asked.base == {name: files[name][0] for name in ("dataset", "source")}


def test_finished_runs_take_over_the_wandb_mode_that_a_sweep_is_given(study: Path) -> None:
    runs = [
        made_run(study, [1.0] * 3, name=f"mlp-icfm-digits-none-seed{seed}", seed=seed)
        for seed in (0, 1)
    ]
    command = ["sweep", "--seed", "0", "1", "--epochs", "3", "--name", "s", "--cluster", "local"]

    def modes(*more: str) -> list[str]:
        assert run_command([*command, *more]) == 0
        return [run.config().tracking.wandb_mode for run in runs]

    assert modes("--wandb-mode", "online", "--dry-run") == ["auto", "auto"]
    assert modes("--wandb-mode", "online") == ["online", "online"]
    assert modes() == ["online", "online"]
    assert all(run.finished() for run in runs)
