"""Every built-in model learns on a GPU with every flow, and with every option of a step."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowjobs.runs.run import Run
from tests.gpu.runs import CONFIG, train, val_losses, with_source

pytestmark = pytest.mark.gpu

FLOWS: dict[str, dict[str, Any]] = {
    "icfm": {"sigma": 0.1},
    "otcfm": {"ot_batch": 64},
    "sbcfm": {"sigma": 0.5},
    "vpcfm": {"sigma": 0.1},
    "fm": {"sigma": 0.01},
}


@pytest.mark.parametrize("arch", ["mlp", "unet", "dit"])
def test_every_model_learns_with_every_flow(study: Path, device: torch.device, arch: str) -> None:
    for flow, options in FLOWS.items():
        run = Run(study, flow)
        trainer = train(run, replace(CONFIG, arch=arch, flow=flow, **options), device)
        assert {of.device for of in trainer.state.model.parameters()} == {device}
        losses = val_losses(run)
        assert len(losses) == CONFIG.epochs
        assert all(map(math.isfinite, losses))
        # Most of the loss of a bridge is its noise, which nothing learns.
        assert losses[-1] < (1.0 if flow == "sbcfm" else 0.9) * losses[0], flow


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"aug": "noise"},
        {"aug": "mixup"},
        {"aug": "dropout"},
        {"time_sampling": "logit-normal"},
        {"normalize": "none"},
        {"source": "rows.pt"},
        {"source": "rows.pt", "flow": "otcfm"},
        {"data_placement": "loader"},
    ],
    ids=str,
)
def test_so_it_does_with_every_option(
    study: Path, device: torch.device, options: dict[str, Any]
) -> None:
    run = Run(study, "a")
    train(run, replace(CONFIG, **with_source(options)), device)
    losses = val_losses(run)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.9 * losses[0]


def test_the_pairs_of_a_run_are_made_and_learned_on_the_gpu(
    study: Path, device: torch.device
) -> None:
    train(Run(study, "teacher"), CONFIG, device)
    run = Run(study, "reflow")
    train(run, replace(CONFIG, flow="reflow", reflow_from="teacher"), device)
    losses = val_losses(run)
    assert losses[-1] < losses[0]


def test_data_that_are_kept_on_the_gpu_give_the_bits_of_those_that_are_read(
    study: Path, device: torch.device
) -> None:
    losses = []
    for placement in ("device", "loader"):
        run = Run(study, placement)
        config = replace(CONFIG, data_placement=placement, deterministic=True)
        trainer = train(run, config, device)
        weights = [of.detach().cpu() for of in trainer.state.ema.model.parameters()]
        losses.append((val_losses(run), weights))
    (first, weights), (second, others) = losses
    assert first == second
    assert all(map(torch.equal, weights, others))


def test_bf16_computes_in_bf16_with_weights_in_float32(study: Path, device: torch.device) -> None:
    seen: set[torch.dtype] = set()

    def note(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear):
            seen.add(out.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        trainer = train(Run(study, "a"), replace(CONFIG, epochs=1, precision="bf16"), device)
    finally:
        hook.remove()
    assert torch.bfloat16 in seen
    assert {of.dtype for of in trainer.state.model.parameters()} == {torch.float32}
