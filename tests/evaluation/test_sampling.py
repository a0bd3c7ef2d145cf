"""Samples: the solvers' orders, what a sample depends on, and what its picture looks like."""

import math
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flowjobs.config import TrainingConfig
from flowjobs.data.source import NormalSource
from flowjobs.errors import ConfigError, RunInterrupted, SamplingError
from flowjobs.evaluation.pictures import GAP, GAP_LEVEL, draw_grid
from flowjobs.evaluation.sampling import CHUNK, Samples, integrate, joined, sample_chunks
from flowjobs.evaluation.solver import Method, Solver
from flowjobs.evaluation.trained import TrainedModel
from tests.evaluation.drawing import sample

CPU = torch.device("cpu")
STATS = {"mean": torch.zeros(2), "std": torch.ones(2)}


def rotating(x: Tensor, t: Tensor) -> Tensor:
    """A linear field whose speed changes with time: the angle at t = 1 is 1 + 1/2."""
    turned = torch.stack([-x[:, 1], x[:, 0]], dim=1)
    return turned * (1 + t).unsqueeze(1)


def error_of(solver: Solver) -> float:
    x_0 = torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    cos, sin = math.cos(1.5), math.sin(1.5)
    exact = x_0 @ torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    return float((integrate(rotating, x_0, solver).x_1 - exact).abs().max())


@pytest.mark.parametrize(
    ("method", "order", "calls"),
    [("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2), ("rk4", 4, 4)],
)
def test_a_solver_converges_at_its_order(method: Method, order: int, calls: int) -> None:
    errors = [error_of(Solver(method, steps)) for steps in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    # 1/49 is one of the steps that rounding makes one more of.
    for steps in (1, 49, 50):
        found = integrate(rotating, torch.ones(3, 2), Solver(method, steps))
        assert found.nfe == calls * steps


def test_dopri5_keeps_to_its_tolerance() -> None:
    coarse, fine = (error_of(Solver("dopri5", tolerance=tolerance)) for tolerance in (1e-3, 1e-9))
    assert fine < 1e-8 < coarse < 1e-2


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("speed", [1e-3, 1.0])
def test_no_solver_asks_a_model_for_times_that_it_was_not_trained_on(
    method: Method, speed: float
) -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return speed * rotating(x, t)

    x_0 = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    found = integrate(velocity, x_0, Solver(method, 7))
    assert len(times) == found.nfe
    assert min(times) == 0
    assert max(times) <= 1


def test_dopri5_takes_the_same_steps_where_the_energy_is_asked_for() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:  # turns ever faster
        angle = 10 * (1 + t.unsqueeze(1)) * (8 * t.unsqueeze(1)).sin()
        return angle * x.flip(1) * torch.tensor([-1.0, 1.0])

    x_0 = torch.randn((50, 2), generator=torch.Generator().manual_seed(0))
    alone, both = (
        integrate(velocity, x_0, Solver("dopri5"), with_energy=asked) for asked in (False, True)
    )
    assert both.nfe == alone.nfe
    assert torch.equal(both.x_1, alone.x_1)


def test_the_energy_of_a_path_is_the_integral_of_its_squared_speed() -> None:
    # The speed is (1 + t) |x|, and |x| stays: the integral is |x|² 7/3.
    x_0 = torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    found = integrate(rotating, x_0, Solver("rk4", 20), with_energy=True)
    assert found.path_energy is not None
    assert found.path_energy.tolist() == pytest.approx([7 / 3, 28 / 3], rel=1e-4)


class Net(nn.Module):
    """Wide enough that the kernel of its products depends on the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 200), nn.SiLU(), nn.Linear(200, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 3 * self.layers(torch.cat([x, t.unsqueeze(1)], dim=1))


@pytest.mark.parametrize("method", get_args(Method))
def test_a_sample_is_the_same_alone_and_among_others(method: Method) -> None:
    model, solver = Net(), Solver(method, steps=3, tolerance=1e-2)
    many = sample(model, CHUNK + 50, STATS, CPU, solver=solver)
    for n in (1, 7, CHUNK + 1):
        assert torch.equal(sample(model, n, STATS, CPU, solver=solver).x_1, many.x_1[:n])
    other = sample(model, 7, STATS, CPU, seed=1, solver=solver)
    assert not torch.isclose(other.x_1, many.x_1[:7]).any()
    assert len(torch.unique(many.x_0, dim=0)) == CHUNK + 50


def test_a_sample_follows_from_the_seed_where_the_model_draws_too() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.rand_like(x) + random.random() + float(np.random.rand())

    def drawn(n: int, seed: int = 0, first: int = 0) -> Tensor:
        arguments = (Noisy(), n, STATS, CPU, seed, Solver("euler", 2))
        parts = sample_chunks(*arguments, source=NormalSource((2,)), first=first)
        return joined(list(parts)).x_1

    state = torch.get_rng_state()
    whole = drawn(CHUNK + 9)
    assert torch.equal(drawn(9), whole[:9])
    assert torch.equal(drawn(CHUNK + 9, first=1), whole[CHUNK:])  # as interrupted pairs go on
    assert not torch.equal(drawn(9, seed=1), whole[:9])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sample_calls_the_model_on_no_more_rows_than_a_step_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []

    class Watched(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            called.append(len(x))
            return super().forward(x, t)

    source, solver = NormalSource((2,)), Solver("dopri5", tolerance=1e-2)

    def drawn(batch_size: int, ranks: int = 1) -> Samples:
        called.clear()
        config = TrainingConfig(batch_size=batch_size)
        trained = TrainedModel("a", Watched(), STATS, config, 7, CPU, source, ranks=ranks)
        return joined(list(trained.chunks(9, 0, solver)))

    whole = drawn(4)
    assert called == [CHUNK] * int(whole.nfe)  # the rows are small
    monkeypatch.setattr("flowjobs.models.velocity.NUMBERS_AT_ONCE", 30)
    for batch_size, ranks, rows in ((100, 1, 100), (120, 3, 40), (4, 1, 15)):
        found = drawn(batch_size, ranks)
        assert max(called) == rows
        assert (sum(called), found.nfe) == (CHUNK * found.nfe, whole.nfe)
        assert torch.allclose(found.x_1, whole.x_1, atol=1e-5)


@pytest.mark.parametrize("at_once", [CHUNK, 100])
def test_a_model_may_write_its_velocity_to_the_same_memory_each_time(at_once: int) -> None:
    class Kept(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept = torch.empty(CHUNK, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.kept[: len(x)].copy_(super().forward(x, t))

    for solver in (Solver("rk4", 3), Solver("dopri5", tolerance=1e-2)):
        options = {"solver": solver, "at_once": at_once}
        found, expected = (sample(m, 7, STATS, CPU, **options) for m in (Kept(), Net()))
        assert torch.equal(found.x_1, expected.x_1)


def test_a_model_may_change_what_it_is_given() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x, t = x.mul_(2), t.mul_(1000)
            return super().forward(x / 2, t / 1000)

    for solver in (Solver("rk4", 3), Solver("dopri5", tolerance=1e-2)):
        found, expected = (sample(m, 7, STATS, CPU, solver=solver) for m in (InPlace(), Net()))
        assert torch.allclose(found.x_1, expected.x_1, atol=1e-5)
        assert torch.equal(found.x_0, expected.x_0)


@pytest.mark.parametrize("method", get_args(Method))
def test_samples_can_be_stopped_at_each_network_call(method: Method) -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RunInterrupted("told to leave")

    with pytest.raises(RunInterrupted):
        integrate(rotating, torch.ones(3, 2), Solver(method, 7), check=check)
    assert len(calls) == 3


class Explodes(nn.Module):
    """A velocity that no step size follows to t = 1."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.sign() * (x.square() + 1) * 10


def test_what_cannot_be_solved_is_said() -> None:
    with pytest.raises(SamplingError, match=r"sample 0 is not finite \(euler, 20 steps\)"):
        sample(Explodes(), 3, STATS, CPU, solver=Solver("euler", 20))
    with pytest.raises(SamplingError, match=r"dopri5 does not reach t = 1 after .* --tolerance"):
        sample(Explodes(), 3, STATS, CPU, solver=Solver("dopri5"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "eulr"}, "--solver: found 'eulr'.*did you mean euler?"),
        ({"steps": 0}, "--steps: found 0"),
        ({"tolerance": math.nan}, "--tolerance: found nan"),
    ],
)
def test_a_solver_that_cannot_be(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Solver(**arguments)  # type: ignore[arg-type]


def test_a_grid_has_gaps_and_its_pixels_are_squares(tmp_path: Path) -> None:
    images = torch.zeros(5, 8, 8)
    images[4, 0, 0] = 1
    draw_grid(tmp_path / "grid.png", images)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 96 + 4 * GAP, 2 * 96 + 3 * GAP)
        corner = (96 + 2 * GAP, 96 + 2 * GAP)  # the fifth: second row, second column
        assert picture.getpixel((corner[0] - 1, corner[1])) == GAP_LEVEL
        assert [picture.getpixel((corner[0] + x, corner[1])) for x in (0, 11, 12)] == [255, 255, 0]
