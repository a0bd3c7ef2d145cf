"""The same run on a GPU, on a CPU and from a notebook."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flowjobs as package
from flowjobs.data.randomness import random_numbers_kept
from flowjobs.errors import RunInterrupted
from flowjobs.evaluation.evaluate import QUICK, evaluate
from flowjobs.models.build import build_model
from flowjobs.runs.run import Run
from flowjobs.training import FlowDataset, FlowTrainer
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.same_bits import differences
from tests.gpu.runs import CONFIG, DIM, STEPS, STEPS_PER_EPOCH, train, two_clusters, val_losses

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")


def test_a_run_goes_on_on_a_cpu_and_back_on_the_gpu(
    study: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    run, whole = Run(study, "a"), Run(study, "whole")
    gpu = torch.cuda.get_device_name(device)
    for here, leave_at in ((device, 25), (CPU, 55)):
        with pytest.raises(RunInterrupted):
            train(run, CONFIG, here, leave_at=(leave_at,))
    assert f"so far this run used device {gpu}, now cpu" in caplog.text
    caplog.clear()
    train(run, CONFIG, device)
    assert f", now {gpu}: it resumes, but its bits will differ" in caplog.text
    assert [attempt.last_step for attempt in run.status().attempts] == [25, 55, STEPS]
    assert read_checkpoint(run.last)["computed_with"]["device"] == gpu
    # The numbers that a GPU draws are others: it learns the same by other steps.
    train(whole, CONFIG, device)
    assert val_losses(run)[-1] == pytest.approx(val_losses(whole)[-1], rel=0.2)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_torch_alone_loads_a_checkpoint_of_a_gpu_where_there_is_none(
    study: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = Run(study, "a")
    train(run, replace(CONFIG, epochs=1), device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = "import sys, torch; print(torch.load(sys.argv[1], weights_only=True)['step'])"
    done = subprocess.run(
        [sys.executable, "-c", code, run.checkpoints / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{STEPS_PER_EPOCH}\n", done.stderr


def test_samples_and_their_measures_are_those_of_a_cpu_but_for_rounding(
    study: Path, device: torch.device
) -> None:
    run = Run(study, "a")
    train(run, CONFIG, device)
    on_gpu, on_cpu = package.load("a", study), package.load("a", study, device="cpu")
    assert (on_gpu.device.type, on_cpu.device.type) == ("cuda", "cpu")
    for solver in ("midpoint", "dopri5"):
        there, here = (of.sample(300, solver=solver, tolerance=1e-5) for of in (on_gpu, on_cpu))
        assert there.device == here.device == CPU
        # Where paths part between the clusters, rounding grows.
        assert torch.isclose(there, here, rtol=1e-3, atol=1e-2).float().mean() > 0.9
        assert (there - here).abs().max() < 0.2
    data = FlowDataset(two_clusters(400, seed=3)), FlowDataset(two_clusters(300, seed=4))
    found, expected = (evaluate(of, *data, QUICK)["measures"] for of in (on_gpu, on_cpu))
    assert found.keys() == expected.keys()
    for name, measure in expected.items():
        near = pytest.approx(measure["value"], rel=0.02, abs=0.01)
        assert found[name]["value"] == near, name
        assert found[name]["floor"] == pytest.approx(measure["floor"], rel=1e-3, abs=0.01), name


def test_a_notebook_names_its_gpu_as_it_likes_and_keeps_its_random_numbers(
    study: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = replace(CONFIG, deterministic=True)
    data = FlowDataset(two_clusters(323, seed=1)), FlowDataset(two_clusters(100, seed=2))
    torch.cuda.manual_seed(3)
    before = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    for name in ("cuda", "cuda:0"):
        with random_numbers_kept():  # all of them: to build a model seeds every GPU
            model = build_model(config, DIM)
        result = FlowTrainer(model, config, *data, name, name=name.replace(":", "-")).train()
        assert result["steps"] == STEPS
    assert differences(Run(study, "cuda"), Run(study, "cuda-0")) == []
    package.load("cuda", study, device="cpu").sample(3)
    package.load("cuda", study, device="cuda:0").sample(3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], torch.cuda.get_rng_state(device))
