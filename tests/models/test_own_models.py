"""How people build a model: it is trained as it was meant, or refused in words at its start."""

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowjobs.errors import ConfigError, RunInterrupted
from flowjobs.models.checks import check_restart
from flowjobs.models.velocity import frozen_in_evaluation
from tests.models.test_dtypes import CPU, Net, net, train, trainer_of


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


class Calls(Net):
    """One whose forward is a function that it holds."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.drop, self.called = nn.Dropout(0.5), make(self)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.called(self, x, t)


def refused(model: nn.Module, said: str, study: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        train(model)
    assert not list(study.glob("checkpoints/*/*"))


def wrapped(model: nn.Module) -> None:
    """Hold a function over a method, as torch.compile(model.forward) is one."""
    forward = model.forward
    model.forward = lambda *args: forward(*args)  # type: ignore[method-assign]  # noqa: PLW0108


def weakly(model: Any) -> Any:
    first = weakref.ref(model.first)
    return lambda of, x, t: of.second(torch.tanh(first()(x)))


@pytest.mark.parametrize(
    "model",
    [
        lambda: Calls(lambda model: lambda of, x, t: Net.forward(model, x, t)),
        lambda: Calls(lambda model: lambda of, x, t: Net.forward(of, model.drop(x), t)),
        lambda: Calls(lambda model: lambda of, x, t: of.second(x @ model.first.weight.T)),
        lambda: Calls(weakly),
        lambda: net(wrapped),
    ],
)
def test_a_function_over_the_model_itself_is_refused(study: Path, model: Any) -> None:
    refused(model(), "a copy of the model computes with the model itself.*--compile", study)


class Listens(Net):
    """Its layer leaves its output in a list of the model, by a hook over the model."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self.first.register_forward_hook(lambda part, args, out: kept(self).append(out))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.found.clear()
        self.first(x)
        return self.second(torch.tanh(self.found[-1]))


def test_a_hook_over_the_model_itself_fails_with_a_note(study: Path) -> None:
    with pytest.raises(IndexError) as caught:
        train(Listens(lambda model: model.found))
    assert "a copy of the model" in caught.value.__notes__[0]
    assert not list(study.glob("checkpoints/*/*"))


class InAList(Net):
    """Layers in a plain list, which torch does not know of."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = list(layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return super().forward(x, t)


def test_weights_that_torch_does_not_know_of_are_refused(study: Path) -> None:
    said = r"uses weights of shape \(3, 3\).* not among its parameters.*nn.ModuleList"
    refused(InAList(nn.Tanh(), nn.Linear(3, 3, bias=False)), said, study)


def test_frozen_weights_that_torch_does_not_know_of_are_no_harm(study: Path) -> None:
    layer = nn.Linear(3, 3).requires_grad_(False)
    before = layer.weight.clone()
    train(InAList(layer))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "scale", torch.ones(3, requires_grad=True)),
        lambda model: model.register_buffer("scale", torch.ones(3, requires_grad=True)),
    ],
)
def test_a_tensor_that_is_no_parameter_but_wants_a_gradient_is_refused(
    study: Path, change: Any
) -> None:
    refused(net(change), "scale requires a gradient and is no nn.Parameter", study)


class Energy(Net):
    """The gradient of an energy, which wants gradients also where it is sampled."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(x, t).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


class Shared(nn.Linear):
    """Frozen, and too large to be held twice."""

    def __deepcopy__(self, memo: object) -> "Shared":
        return self


@pytest.mark.parametrize(
    "model",
    [
        Energy,
        lambda: net(lambda model: setattr(model, "first", Shared(3, 8).requires_grad_(False))),
        lambda: net(lambda model: nn.utils.parametrizations.weight_norm(model.first)),
        lambda: net(lambda model: model.first.register_forward_hook(lambda part, args, out: -out)),
    ],
)
def test_other_ways_to_build_a_model_are_no_harm(study: Path, model: Any) -> None:
    torch.manual_seed(0)
    assert train(model()) < 5


class Pretrained(Net):
    """Holds a frozen part that its constructor has put into evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        part = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.encoder = part.requires_grad_(False).eval()
        self.begun = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.encoder.training and not self.begun:
            self.first.weight.data.mul_(2)
        self.begun = True
        return super().forward(self.encoder(x), t)


def test_parts_stay_in_evaluation_mode(study: Path) -> None:
    torch.manual_seed(0)
    model, whole = Pretrained(), Pretrained()
    whole.load_state_dict(model.state_dict())
    expected = train(whole, "whole")
    asked = itertools.count(1)
    trainer = trainer_of(model, "run", stop_reason=lambda: "test" if next(asked) == 3 else None)
    with pytest.raises(RunInterrupted):
        trainer.train()
    model.eval()  # as to look at samples
    assert trainer.train()["best_val_loss"] == expected
    modes = {name: part.training for name, part in model.named_modules()}
    assert {name for name, training in modes.items() if not training} == {
        "encoder",
        "encoder.0",
        "encoder.1",
    }
    assert model.encoder[0].num_batches_tracked == whole.encoder[0].num_batches_tracked == 0


class Freezes(Net):
    """Keeps a part in evaluation mode by a `train` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.BatchNorm1d(3)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(self.encoder(x), t)


def test_a_train_of_ones_own_decides_what_stays_in_evaluation_mode(study: Path) -> None:
    model = Freezes()
    train(model)
    assert model.encoder.num_batches_tracked == 0


def test_a_restart_is_tried_with_the_models_modes() -> None:
    model, built = Pretrained(), Pretrained()
    model.begun = True
    check_restart(model, built.eval(), (4, 3), CPU)
    model.encoder.train()
    with pytest.raises(ConfigError, match=r"initializes first\.weight"):
        check_restart(model, built, (4, 3), CPU)


class Scripted(Net):
    """Has an encoder in TorchScript, as a file of one is loaded."""

    def __init__(self, hold: Any) -> None:
        super().__init__()
        encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False).eval()
        self.encoder = hold(torch.jit.script(encoder))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        encoder = self.encoder if callable(self.encoder) else self.encoder[0]
        return super().forward(encoder(x), t)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_a_part_in_torchscript_is_refused_with_a_way_out(study: Path) -> None:
    for hold in (lambda part: part, torch.jit.freeze):
        refused(
            Scripted(hold), r"encoder is in TorchScript.*self.encoder = \[torch.jit.load", study
        )
    refused(torch.jit.script(net()), "the model is in TorchScript", study)
    assert train(Scripted(lambda part: [part])) < 5


class TimeFirst(Net):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, t)


class Adapted(TimeFirst):
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return super().__call__(t, x)  # type: ignore[no-any-return]


def test_a_model_that_takes_its_time_first_is_refused_unless_it_is_called_so(study: Path) -> None:
    refused(
        TimeFirst(),
        r"TimeFirst: its forward takes \(t: .*Tensor, x: .*expected \(x, t\): put",
        study,
    )
    assert train(Adapted()) < 5


def test_a_part_to_be_trained_is_trained_in_training_mode() -> None:
    # Libraries give what is pretrained in evaluation mode.
    frozen, tuned = nn.Linear(3, 3).requires_grad_(False).eval(), nn.Sequential(nn.Linear(3, 3))
    model = nn.ModuleList([frozen, tuned.eval(), nn.Dropout().eval()])
    assert frozen_in_evaluation(model) == [frozen, model[2]]
    assert frozen_in_evaluation(model.eval()) == []
