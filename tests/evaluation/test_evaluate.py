"""An evaluation: a perfect model scores its floor, one that memorizes is found out."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowjobs.config import TrainingConfig
from flowjobs.data.dataset import FlowDataset, load_datasets
from flowjobs.data.source import NormalSource, RowSource
from flowjobs.errors import ConfigError, DataError, RunInterrupted
from flowjobs.evaluation import evaluate as evaluation
from flowjobs.evaluation import sampling
from flowjobs.evaluation.evaluate import QUICK, Scope, evaluate
from flowjobs.evaluation.solver import Solver
from flowjobs.evaluation.trained import TrainedModel


class Still(nn.Module):
    """The velocity of a source that is the data already."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


class ToNearest(nn.Module):
    """Leads every point to the nearest of some: the model that has memorized its data."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 20 * (self.rows[torch.cdist(x, self.rows).argmin(1)] - x)


def trained(model: nn.Module, *shape: int) -> TrainedModel:
    shape = shape or (2,)
    stats = {"mean": torch.zeros(shape), "std": torch.ones(shape)}
    source = NormalSource(shape)
    return TrainedModel("a", model, stats, TrainingConfig(), 7, torch.device("cpu"), source)


def normal_data(n: int, seed: int, *shape: int) -> FlowDataset:
    return FlowDataset(
        torch.randn((n, *(shape or (2,))), generator=torch.Generator().manual_seed(seed))
    )


SCOPE = Scope(n=200, repeats=3, with_c2st=False, solver=Solver("midpoint", 20))
FEW = dataclasses.replace(SCOPE, n=50, repeats=2)
# Without the curve over network calls.
MEASURES = dataclasses.replace(FEW, euler_steps=())


def test_a_perfect_model_scores_its_floor_and_its_paths_are_the_shortest() -> None:
    found = evaluate(trained(Still()), normal_data(400, 1), normal_data(300, 2), SCOPE)
    assert (found["n"], found["repeats"], found["nfe"], found["step"]) == (200, 3, 40, 7)
    for name, of in found["measures"].items():
        if name not in ("path_energy", "npe"):
            assert of["value"] == pytest.approx(of["floor"], abs=4 * of["std"] + 0.03), name
    assert found["measures"]["path_energy"]["value"] == 0
    better = {name: of["lower_is_better"] for name, of in found["measures"].items()}
    assert (better["frechet"], better["coverage"], better["nn_train"]) == (True, False, None)
    assert better["path_energy"] is None  # that of a model which leads nowhere is the least
    assert list(found["by_nfe"]) == ["1", "2", "4", "8", "16", "32", "64", "dopri5"]
    assert found["nfe_of_dopri5"] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("shape", [(2, 2), (2, 1)])
def test_small_rows_of_any_shape_are_measured_as_vectors(shape: tuple[int, ...]) -> None:
    n = math.prod(shape)
    rows, flat = (
        evaluate(trained(Still(), *of), normal_data(60, 1, *of), normal_data(60, 2, *of), FEW)
        for of in (shape, (n,))
    )
    assert rows == flat


def test_the_energy_of_a_shift_is_the_squared_distance() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, 3.0)

    data = [FlowDataset(normal_data(400, seed).data + 3) for seed in (1, 2)]
    scope = dataclasses.replace(SCOPE, euler_steps=())
    measures = evaluate(trained(Shift()), *data, scope)["measures"]
    assert measures["path_energy"]["value"] == pytest.approx(18)
    assert measures["path_energy"]["floor"] == pytest.approx(18, rel=0.05)
    assert measures["npe"]["value"] < 0.05
    # A detour costs: the same ends, twice as far at first.
    detour = Detour()
    measures = evaluate(trained(detour), *data, scope)["measures"]
    assert measures["path_energy"]["value"] == pytest.approx(18 * 4 / 3, rel=0.01)
    assert measures["npe"]["value"] == pytest.approx(1 / 3, abs=0.05)


class Detour(nn.Module):
    """Speed 6 (1 - t): as far as 3 in all, with 4/3 of the energy."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(x) * (6 * (1 - t)).unsqueeze(1)


FAR = torch.zeros(16, dtype=torch.float64).index_fill(0, torch.tensor(3), 1e7)


def test_a_model_that_memorizes_is_found_out() -> None:
    train, val = normal_data(60, 1, 16), normal_data(60, 2, 16)
    memorized = trained(ToNearest(train.data), 16)
    found = evaluate(memorized, train, val, MEASURES)["measures"]
    assert found["memorization"]["value"] == 1
    assert found["memorization"]["best"] == found["memorization"]["floor"] == 0.5
    assert found["nn_train"]["value"] < 0.01 * found["nn_train"]["floor"]
    # Columns that are far from one another are no farther from a row.
    moved = dataclasses.replace(memorized, stats={**memorized.stats, "mean": FAR})
    parts = [FlowDataset(part.data + FAR) for part in (train, val)]
    found = evaluate(moved, *parts, MEASURES)["measures"]
    assert found["memorization"]["value"] == 1
    found = evaluate(trained(Still(), 16), train, val, MEASURES)["measures"]
    assert found["memorization"]["value"] == pytest.approx(0.5, abs=0.15)
    # Whatever the sizes of both parts.
    train, scope = normal_data(600, 1, 16), dataclasses.replace(MEASURES, n=60)
    for model, value in ((ToNearest(train.data), 1), (Still(), 10 / 11)):
        found = evaluate(trained(model, 16), train, val, scope)["measures"]
        of = found["memorization"]
        assert of["value"] == pytest.approx(value, abs=0.1 if value < 1 else 0)
        assert (of["floor"], of["note"]) == (pytest.approx(10 / 11), None)
    # But for the training rows that are not looked at.
    some = dataclasses.replace(scope, nearest_among=60)
    found = evaluate(trained(ToNearest(train.data), 16), train, val, some)
    said = "60 of 600 training rows were looked at: copies of others are not seen"
    assert [found["measures"][name]["note"] for name in ("nn_train", "memorization")] == [said] * 2
    assert found["nearest_among"] == 60
    assert "wasserstein2" not in found  # 16 dimensions are too many for 50 points
    assert "npe" not in found


def test_rows_that_both_parts_have_are_not_memorized() -> None:
    rows = normal_data(60, 1, 4).data
    train, val = FlowDataset(rows), FlowDataset(rows.flip(0))
    for model in (ToNearest(rows), Still()):
        found = evaluate(trained(model, 4), train, val, FEW)["measures"]
        assert found["memorization"]["value"] == 0.5


def test_paths_from_the_very_rows_where_they_end_have_no_npe() -> None:
    train, val = normal_data(60, 1), normal_data(40, 2)
    model, scope = trained(Still()), dataclasses.replace(MEASURES, n=40)
    stats = model.stats["mean"], model.stats["std"]
    found = evaluate(dataclasses.replace(model, source=RowSource(val, *stats)), train, val, scope)
    assert "npe" not in found["measures"]
    assert found["measures"]["path_energy"]["floor"] == pytest.approx(0, abs=1e-6)


def test_no_start_comes_twice_among_the_samples_that_are_measured() -> None:
    train, val, model = normal_data(60, 1), normal_data(40, 2), trained(Still())
    scope = dataclasses.replace(MEASURES, n=None)
    for rows, n in ((7, 7), (50, 40)):
        source = RowSource(normal_data(rows, 3), *model.stats.values())
        found = evaluate(dataclasses.replace(model, source=source), train, val, scope)
        assert (found["n"], found["measures"]["recall"]["value"] > 0.8) == (n, True)
        with pytest.raises(ConfigError, match=rf"-n: found 41, expected at most {n}.*{rows}"):
            dataclasses.replace(scope, n=41).rows(train, val, source)
    with pytest.raises(DataError, match="5 rows are too few"):
        scope.rows(train, val, RowSource(normal_data(5, 3), *model.stats.values()))


def test_too_few_points_for_a_covariance_are_said() -> None:
    parts = normal_data(60, 1, 50), normal_data(60, 2, 50)
    for n, noted in ((50, True), (51, False)):
        scope = dataclasses.replace(FEW, n=n, repeats=1, euler_steps=())
        found = evaluate(trained(Still(), 50), *parts, scope)["measures"]
        assert bool(found["frechet"]["note"]) is noted


def test_rows_that_are_often_in_the_data_are_said() -> None:
    train, val = normal_data(60, 1), normal_data(60, 2)
    for copies, said in ((1, ""), (7, "7 of 60 validation rows are there more than 5 times")):
        val.data[:copies] = val.data[0]
        scope = dataclasses.replace(MEASURES, n=60, repeats=1)
        note = evaluate(trained(Still()), train, val, scope)["measures"]["coverage"]["note"]
        assert (note or "").partition(":")[0] == said


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ([1.0, 1.0, 1000.0, *[1.0] * 5], "column 2 has 99.9 % of the variance"),
        ([100.0, 100.0, *[1.0] * 18], "2 of 20 columns have 99.9 % of the variance"),
        ([5.0, 5.0, *[1.0] * 8, *[0.0] * 10], None),  # of 10, as pixels that are never lit
        ([2.0, 1.0], None),
        ([1.0], None),
    ],
)
def test_columns_that_decide_all_distances_are_said(scales: list[float], said: str | None) -> None:
    dim, scale = len(scales), torch.tensor(scales)
    assert caution(*(normal_data(60, seed, dim).data * scale for seed in (1, 2))) == said


@pytest.mark.parametrize("name", ["digits", "moons", "8gaussians", "scurve"])
def test_in_the_datasets_that_come_along_no_columns_decide(name: str, tmp_path: Path) -> None:
    assert caution(*(part.data for part in load_datasets(name, tmp_path))) is None


def caution(*parts: Tensor) -> str | None:
    """What is said at a distance, and at no measure that does not depend on units."""
    data = [FlowDataset(rows) for rows in parts]
    scope = dataclasses.replace(QUICK, n=50)
    work = evaluation._Evaluation(trained(Still(), *data[0].shape), *data, scope, lambda: None, {})
    assert {work.note(name) for name in ("c2st", "path_energy", "npe")} == {None}
    (note,) = {work.note(name) for name in ("sliced_wasserstein", "mmd", "coverage")}
    return note and note.partition(":")[0]


def test_it_is_the_same_each_time_and_can_be_stopped_between_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = (trained(Still()), normal_data(300, 1), normal_data(300, 2), QUICK)
    first = evaluate(*arguments)
    assert first == evaluate(*arguments)
    monkeypatch.setattr(evaluation, "rows_of_chunk", lambda dim: 70)
    in_parts = evaluate(*arguments)["measures"]
    for name in ("nn_train", "memorization"):
        assert in_parts[name]["value"] == pytest.approx(first["measures"][name]["value"])
    assert first["measures"]["sliced_wasserstein"]["std"] > 0
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 5:
            raise RunInterrupted("told to leave")

    with pytest.raises(RunInterrupted):
        evaluate(*arguments, check)
    assert len(asked) == 5


class OnlySmooth(nn.Module):
    """Jumps at each point: no step of dopri5 is small enough."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (1e6 * x).sin() * 1e3


def test_a_solver_that_fails_leaves_the_others(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MAX_ADAPTIVE_STEPS", 50)
    with caplog.at_level(logging.WARNING):
        found = evaluate(trained(OnlySmooth()), normal_data(50, 1), normal_data(50, 2), QUICK)
    assert "dopri5" not in found["by_nfe"]
    assert found["nfe_of_dopri5"] is None
    assert math.isfinite(found["by_nfe"]["64"]["frechet"])
    assert "dopri5 does not reach t = 1" in caplog.text


def test_too_few_rows_and_too_many_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = normal_data(5, 1), normal_data(50, 2)
    with pytest.raises(DataError, match="5 rows are too few"):
        evaluate(trained(Still()), many, few, QUICK)
    with pytest.raises(ConfigError, match=r"-n: found 60, expected at most 50"):
        evaluate(trained(Still()), many, many, Scope(n=60))
    free = 1e5
    monkeypatch.setattr(evaluation, "free_memory_bytes", lambda: free)
    with pytest.raises(ConfigError, match=r"-n: found 50, whose exact transport.*give fewer"):
        evaluate(trained(Still()), many, many, Scope())
    wide = normal_data(50, 1, 5)
    assert Scope().rows(wide, wide, NormalSource((5,))) == 50  # of which none is computed
    with pytest.raises(ConfigError, match=r"-n: found 2, expected at least 6"):
        Scope(n=2)
    with pytest.raises(ConfigError, match=r"--repeats: found 0"):
        Scope(repeats=0)
