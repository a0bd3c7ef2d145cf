"""EMA, schedule, randomness, augmentation, model: the small parts of a step."""

import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowjobs.config import TrainingConfig
from flowjobs.data.augmentation import augmented
from flowjobs.data.dataset import FlowDataset
from flowjobs.data.randomness import derive_seed, epoch_order, seed_step
from flowjobs.data.source import NormalSource
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues
from flowjobs.flows.flow import Flow, flow_of, icfm_path
from flowjobs.models.build import build_model
from flowjobs.models.mlp import MLP
from flowjobs.training import EMAModel, get_cosine_schedule_with_warmup
from flowjobs.training.ranks import single_process
from flowjobs.training.validation import Validation
from flowjobs.user_code import user_place

CPU = torch.device("cpu")


def test_ema_is_the_average_it_says() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMAModel(model, decay=0.5)
    expected = model.weight.item()
    for update, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0] * 4):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    assert math.isclose(float(ema.shadow["weight"]), expected, rel_tol=1e-6)


def test_ema_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    ema = EMAModel(model)
    model(torch.randn(8, 2))
    ema.update(model)
    assert torch.equal(ema.shadow["running_mean"], model.running_mean)


@pytest.mark.parametrize("now", [torch.tensor(0.8), torch.tensor(1.0 + 2.0j)])
def test_ema_copies_buffers_whose_type_forward_changes(now: torch.Tensor) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.tensor(1), persistent=False)
    ema = EMAModel(model)
    model.scale = now
    for _ in range(2):
        ema.update(model)
        assert torch.equal(ema.model.get_buffer("scale"), now)


def test_schedule_warms_up_and_decays_to_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 4, 12)
    rates = []
    for _ in range(14):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert math.isclose(rates[8], 1.0)
    assert rates[12:] == [0.0, 0.0]


def test_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(*parts) for parts in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1))}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_step_can_be_replayed_alone() -> None:
    def draw(step: int) -> torch.Tensor:
        seed_step(CPU, seed=3, step=step, rank=0)
        return torch.randn(4)

    first, second = draw(7), draw(8)
    assert torch.equal(draw(7), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("flow", "ot_batch"), [("icfm", None), ("otcfm", 64)])
def test_validation_calls_the_model_on_no_more_rows_than_a_step_does(
    flow: str, ot_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = FlowDataset(torch.randn(1500, 3, generator=torch.Generator().manual_seed(0)))
    mean, std = torch.zeros(3), torch.ones(3)
    losses = []
    monkeypatch.setattr("flowjobs.models.velocity.NUMBERS_AT_ONCE", 30)  # the rows are large
    for rows in (ot_batch or 1024, 16):
        config = TrainingConfig(flow=flow, batch_size=rows, ot_batch=ot_batch)
        called: list[int] = []

        def velocity(x: torch.Tensor, t: torch.Tensor, called: list[int] = called) -> torch.Tensor:
            called.append(len(x))
            return x * t.unsqueeze(1)

        validation = Validation(
            *(dataset, flow_of(config), NormalSource((3,)), config, mean, std),
            single_process(CPU),
        )
        losses.append(validation.mean_of(validation.total(velocity)))
        assert (max(called), sum(called)) == (rows, 1500)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # of the same noise and times


class OnGpu(torch.Tensor):
    """Says so, and is on the CPU."""

    is_cuda = True


def validation_as_on_a_gpu(flow: str) -> Validation:
    config, dataset = TrainingConfig(flow=flow), FlowDataset(torch.arange(120.0).view(40, 3))
    mean, std = torch.zeros(3).as_subclass(OnGpu), torch.ones(3)
    arguments = (dataset, flow_of(config), NormalSource((3,)), config, mean, std)
    return Validation(*arguments, single_process(CPU))


def test_a_model_that_writes_into_what_it_is_given_is_validated_on_the_same_each_epoch() -> None:
    def writes(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t *= 1000
        x += t.unsqueeze(1)
        return x

    validation = validation_as_on_a_gpu("icfm")
    assert validation.is_kept
    losses = [float(validation.total(writes)) for _ in range(3)]
    assert losses == [losses[0]] * 3


def draws(
    x_0: torch.Tensor, x_1: torch.Tensor, t: torch.Tensor, sigma: float, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A path that is noisy by itself."""
    return x_0.lerp(x_1, t) + torch.randn_like(x_0), x_1 - x_0


def centres(x_0: torch.Tensor, x_1: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    """A coupling that computes its costs in the memory that it is given."""
    return torch.cdist(x_1.sub_(x_1.mean(0)), x_0.mul_(100)).argmin(1)


CENTRED = Flow(icfm_path, couple=centres)


@pytest.mark.parametrize("flow", ["draws", "CENTRED"])
def test_an_own_flow_is_validated_alike_whenever_the_process_began(flow: str) -> None:
    def loss(validation: Validation, step: int) -> float:
        torch.manual_seed(step)  # as the trainer does
        return float(validation.total(lambda x, t: x))

    path = f"{__name__}:{flow}"
    whole, restarted = (validation_as_on_a_gpu(path) for _ in range(2))
    assert [loss(whole, step) for step in (1, 2)][1] == loss(restarted, 2)
    assert loss(whole, 1) == loss(validation_as_on_a_gpu(path), 1)


def test_mixup_leaves_a_row_mostly_itself_where_it_has_a_partner() -> None:
    rows, config = torch.eye(200), TrainingConfig(aug="mixup")
    own = {paired: augmented(rows, config, 0, 0, paired=paired).diag() for paired in (True, False)}
    assert ((own[True] >= 0.5) & (own[True] <= 1)).all()
    assert float((own[False] < 0.5).double().mean()) > 0.3
    # The same draws: the share of the row itself, or of the other where that is more.
    assert torch.allclose(own[True], own[False].maximum(1 - own[False]))


def test_an_epochs_order_follows_from_seed_and_epoch() -> None:
    assert torch.equal(epoch_order(50, seed=1, epoch=2), epoch_order(50, seed=1, epoch=2))
    assert not torch.equal(epoch_order(50, seed=1, epoch=2), epoch_order(50, seed=1, epoch=3))
    assert torch.equal(epoch_order(50, 1, 2).sort().values, torch.arange(50))


def test_weights_follow_from_the_seed() -> None:
    config = TrainingConfig(arch_args=KeyValues(width=16), seed=5)
    first, second = build_model(config, 4), build_model(config, 4)
    assert str(first.state_dict()) == str(second.state_dict())


DRAWS = """
import random
import numpy
import torch

DRAWN = random.random(), numpy.random.rand(), float(torch.rand(()))

class Net(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.layer, self.drawn = torch.nn.Linear(dim, dim), DRAWN
"""


def test_what_a_module_draws_as_it_is_imported_is_the_same_in_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "draws_at_import.py").write_text(DRAWS)
    monkeypatch.syspath_prepend(tmp_path)
    drawn = []
    for seed in (0, 0, 1):
        for anew in (random.seed, np.random.seed, torch.seed):  # as in a new process
            anew()
        drawn.append(build_model(TrainingConfig(arch="draws_at_import:Net", seed=seed), 4).drawn)
        del sys.modules["draws_at_import"]
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_model_of_ones_own() -> None:
    path = "flowjobs.models.mlp:MLP"
    config = TrainingConfig(arch=f"mine={path}", arch_args=KeyValues(width=8))
    assert isinstance(build_model(config, 7), MLP)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (TrainingConfig(arch="torch.nn:Nothing"), "the module torch.nn has no Nothing"),
        (TrainingConfig(arch="torch.nope:Net"), "no module torch.nope"),
        (TrainingConfig(arch="torch:add"), "add is not a subclass"),
        (
            TrainingConfig(arch="collections:OrderedDict"),
            "OrderedDict is not a subclass of",
        ),
        (TrainingConfig(arch_args=KeyValues(widht=3)), "unexpected keyword.*widht.*width: int"),
    ],
)
def test_a_model_that_cannot_be_built(config: TrainingConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_model(config, 4)


@pytest.mark.parametrize(
    ("use", "build"), [("arch", lambda config: build_model(config, 4)), ("flow", flow_of)]
)
@pytest.mark.parametrize(
    "line", ["torch.nothing", "import numpy.nothing", "1 / 0", "eval('relu(')"]
)
def test_a_bug_in_ones_own_module_is_said_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, build: Any, line: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("has_a_bug.py").write_text(f"import torch\n{line}\nclass Net(torch.nn.Module): ...\n")
    expected = (AttributeError, ImportError, ZeroDivisionError, SyntaxError)
    with pytest.raises(expected) as caught:
        build(TrainingConfig(**{use: "has_a_bug:Net"}))
    assert user_place(caught.value) == "has_a_bug.py, line 2"


def test_an_average_without_decay_is_the_weights() -> None:
    model = nn.Linear(300, 300)
    ema = EMAModel(model, decay=0)
    for _ in range(3):
        with torch.no_grad():
            model.weight.normal_()
        ema.update(model)
        assert torch.equal(ema.shadow["weight"], model.weight)


def test_a_share_that_is_a_tensor_averages_the_same_but_for_rounding() -> None:
    table = torch.randn(4, 6)
    model = nn.ParameterList([torch.randn(5, 3), torch.randn(7, dtype=torch.float64)])
    model.append(nn.Parameter(table[:, :3], requires_grad=False))  # not dense
    number, tensor = EMAModel(model), EMAModel(model)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_()
    number.average(model, 0.25)
    tensor.average(model, torch.tensor(0.25))
    for name, averaged in number.shadow.items():
        torch.testing.assert_close(tensor.shadow[name], averaged)
