"""The built-in models: what each promises, whatever the width of the data."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flowjobs.config import BUILT_IN_ARCHS, TrainingConfig
from flowjobs.errors import CheckpointMismatchError, RunInterrupted
from flowjobs.field_values import KeyValues
from flowjobs.models.build import build_model
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import previous_of, read_checkpoint, write_checkpoint
from flowjobs.training.trained import load_trained
from tests.training.test_exactness import CONFIG, train

ARCHS = pytest.mark.parametrize("arch", BUILT_IN_ARCHS)


def built(arch: str, dim: int, **arguments: object) -> nn.Module:
    given = KeyValues({"width": 16, **arguments})
    return build_model(TrainingConfig(arch=arch, arch_args=given), dim)


def disturbed(model: nn.Module) -> nn.Module:
    """With weights in place of the zeros that it starts with."""
    for weights in model.parameters():
        if not weights.any():
            nn.init.normal_(weights, std=0.1)
    return model


@ARCHS
@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_an_untrained_model_predicts_no_velocity(arch: str, dim: int) -> None:
    found = built(arch, dim)(torch.randn(3, dim), torch.rand(3))
    assert torch.equal(found, torch.zeros(3, dim))


@ARCHS
def test_a_model_sees_time_and_all_of_a_row_and_no_other_row(arch: str) -> None:
    model = disturbed(built(arch, 7, depth=2)).double()
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    t = torch.rand(2, dtype=torch.float64, requires_grad=True)
    grad_x, grad_t = torch.autograd.grad(model(x, t)[0].sum(), (x, t))
    assert grad_t[0] != 0
    assert bool((grad_x[0] != 0).all())
    assert grad_t[1] == 0
    assert not grad_x[1].any()


@ARCHS
def test_every_weight_is_trained(arch: str) -> None:
    model = disturbed(built(arch, 7, depth=2))
    model(torch.randn(4, 7), torch.rand(4)).square().sum().backward()
    idle = [name for name, weights in model.named_parameters() if not weights.grad.any()]
    assert idle == []


def test_a_chunk_that_is_filled_up_changes_nothing_of_the_rest() -> None:
    model = built("dit", 10, chunk=4)
    assert (len(model.linear_in.bias), model.padding) == (3, 2)
    assert model(torch.randn(2, 10), torch.rand(2)).shape == (2, 10)


def test_a_checkpoint_of_the_mlp_as_it_was_before_is_refused_in_words(study: Path) -> None:
    run = Run(study, "old")
    with pytest.raises(RunInterrupted):
        train(run, CONFIG, steps=7)
    for path in (run.last, run.best):
        payload = read_checkpoint(path)
        for part in ("model_state_dict", "ema_shadow"):
            payload[part]["blocks.0.linear_time.weight"] = payload[part].pop(
                "norm.modulation.weight"
            )
        path.unlink()
        write_checkpoint(path, payload)
        previous_of(path).unlink(missing_ok=True)
    with pytest.raises(
        CheckpointMismatchError, match=r"blocks.0.linear_time.weight: .* there, abs"
    ):
        train(run, CONFIG)
    status = run.status()
    status.attempts[0].job = replace(status.attempts[0].job, log="a log")  # as a job has
    status.write(run.status_file)
    with pytest.raises(
        CheckpointMismatchError, match=r"another model than MLP is now .*restore the"
    ):
        load_trained(run, "cpu")
