"""Models of the user's own, with what only a GPU has and with what no graph can hold."""

import logging
import random
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowjobs.runs.run import Run
from tests.gpu.runs import (
    CONFIG,
    assert_same_bits,
    train,
    train_in_three_ways,
    val_losses,
)

pytestmark = pytest.mark.gpu

HEADERS = Path(sysconfig.get_paths()["include"])
# Triton compiles a part of itself with them.
can_compile = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc")) or not (HEADERS / "Python.h").exists(),
    reason="needs a C compiler and Python's headers",
)


class Net(nn.Module):
    """What the others change."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(dim + 1, 64)
        self.linear_out = nn.Linear(64, dim)

    def hidden(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear_in(torch.cat([x, t.unsqueeze(-1)], dim=-1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear_out(torch.relu(self.hidden(x, t)))


class Squared(torch.autograd.Function):
    """Of positive numbers; with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 2 * x.clamp(min=0)


class Native(Net):
    """Memory of the device, mixed precision of its own, a function with its own backward."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise = torch.zeros(len(x), 1, device=x.device)
        if self.training:
            noise.normal_()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = Squared.apply(self.hidden(x + 0.01 * noise, t).float())
        return self.linear_out(hidden)


class Streams(Net):
    """Computes two halves beside one another."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.other = nn.Linear(dim, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            other = self.other(x)
        hidden = self.hidden(x, t)
        here.wait_stream(beside)
        other.record_stream(here)
        return self.linear_out(torch.relu(hidden + other))


class Normed(Net):
    """Statistics in buffers: one written into, one put anew, and BatchNorm's."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.BatchNorm1d(64)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.steps += 1
        return self.linear_out(torch.relu(self.norm(self.hidden(x - self.mean, t))))


class Chance(Net):
    """Draws from four generators."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.hidden(x, t)
        if self.training:
            scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
            on_cpu = torch.rand(1, device="cpu").to(x.device)
            hidden = hidden * scale + 0.1 * torch.rand_like(hidden) + 0.1 * on_cpu
        return self.linear_out(torch.relu(hidden))


class Rolls(Net):
    """Draws from generators that no GPU has."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return scale * self.linear_out(torch.relu(self.hidden(x, t)))


class Writes(Net):
    """Changes what it is given, in place."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t *= 10
        x += self.linear_out.bias.detach()
        return super().forward(x, t / 10)


class Looks(Net):
    """Brings a number back from the GPU in each step, which no graph can hold."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        size = x.abs().mean().item()
        return self.linear_out(torch.relu(self.hidden(x / max(size, 0.5), t)))


class Chooses(Net):
    """Takes the rows that it is given in another number each time."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        late = t > 0.5
        out = self.linear_out(torch.relu(self.hidden(x, t)))
        return out.index_add(0, late.nonzero().squeeze(1), 0.1 * out[late])


class Counts(Net):
    """Does something else in every third call, by a number that it keeps to itself."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = 1.0
        if self.training:
            self.calls += 1
            scale = 1 + 0.2 * (self.calls % 3)
        return scale * self.linear_out(torch.relu(self.hidden(x, t)))


# Of the streams, each of which is another one in the next step.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("model", [Native, Streams, Normed, Chance, Rolls, Writes, Looks, Chooses])
def test_an_own_model_ends_with_the_bits_of_plain_steps_whole_and_in_parts(
    study: Path, device: torch.device, model: type[nn.Module]
) -> None:
    config = replace(
        CONFIG, arch=f"{__name__}:{model.__name__}", deterministic=True, width=None, depth=None
    )
    trained = train_in_three_ways(study, config, device)
    losses = val_losses(Run(study, "whole"))
    assert losses[-1] < losses[0]
    print(f"\n{model.__name__}: captured {trained.captured}")


def test_a_model_that_counts_its_calls_ends_with_the_bits_of_plain_steps(
    study: Path, device: torch.device
) -> None:
    """Not in parts: what it counts is in no state."""
    config = replace(CONFIG, arch=f"{__name__}:Counts", deterministic=True, width=None, depth=None)
    whole, plain = Run(study, "whole"), Run(study, "plain")
    train(whole, config, device)
    train(plain, replace(config, cuda_graph=False), device)
    assert_same_bits(whole, plain)


def test_why_a_models_steps_are_not_captured_is_said(
    study: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, arch=f"{__name__}:Looks", width=None, depth=None)
    with caplog.at_level(logging.INFO, logger="flowjobs"):
        trainer = train(Run(study, "a"), config, device)
    assert not trainer.captured
    assert caplog.text.count("The steps are not captured in a CUDA graph: ") == 1


class InTriton(Net):
    """With a kernel of its own."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear_out(TritonRelu.apply(self.hidden(x, t)))


class TritonRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from tests.gpu.triton_kernel import relu

        out = relu(x.contiguous())
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * (out > 0)


@can_compile
def test_a_model_with_a_triton_kernel_ends_with_the_bits_of_plain_steps(
    study: Path, device: torch.device
) -> None:
    pytest.importorskip("triton")
    config = replace(
        CONFIG, arch=f"{__name__}:InTriton", deterministic=True, width=None, depth=None
    )
    whole, plain = Run(study, "whole"), Run(study, "plain")
    train(whole, config, device)
    train(plain, replace(config, cuda_graph=False), device)
    assert val_losses(whole)[-1] < val_losses(whole)[0]
    assert_same_bits(whole, plain)


@can_compile
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_learns_as_one_that_is_not(study: Path, device: torch.device) -> None:
    pytest.importorskip("triton")
    config = replace(CONFIG, epochs=3)
    plain, compiled = Run(study, "plain"), Run(study, "compiled")
    train(plain, config, device)
    train(compiled, replace(config, compile=True), device)
    # Rounding alone is another one.
    assert val_losses(compiled) == pytest.approx(val_losses(plain), rel=1e-3)
