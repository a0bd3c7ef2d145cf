"""torchcfm's loop, as its examples have it, and ours: the same network, data and number of steps.

pytest -m long -s tests/papers/test_torchcfm.py
"""

import statistics
from pathlib import Path

import pytest
import torch

from flowjobs.config import TrainingConfig
from flowjobs.data.dataset import FlowDataset
from flowjobs.data.source import NormalSource
from flowjobs.data.toy import toy_set
from flowjobs.evaluation.evaluate import Scope, evaluate
from flowjobs.evaluation.solver import Solver
from flowjobs.evaluation.trained import TrainedModel
from flowjobs.runs.datasets import TOY_ROWS
from flowjobs.training import FlowTrainer
from tests.papers.networks import VelocityNet

SEEDS = range(5)
EPOCHS, BATCH, SIGMA = 50, 256, 0.1
STEPS = EPOCHS * (TOY_ROWS // BATCH)
CPU = torch.device("cpu")
MEASURES = ("wasserstein2", "npe")


def config(flow: str, seed: int) -> TrainingConfig:
    """Ours, with their optimizer's settings, and no average that lags behind so few steps."""
    return TrainingConfig(
        arch="velocity=tests.papers.networks:VelocityNet",
        flow=flow,
        dataset="moons",
        normalize="none",
        sigma=SIGMA,
        epochs=EPOCHS,
        batch_size=BATCH,
        warmup_steps=0,
        ema_decay=0.99,
        seed=seed,
    )


def ours(flow: str, seed: int, data: tuple[FlowDataset, FlowDataset], name: str) -> VelocityNet:
    torch.manual_seed(seed)
    trainer = FlowTrainer(VelocityNet(2), config(flow, seed), *data, CPU, name=name)
    assert trainer.train()["steps"] == STEPS
    model = VelocityNet(2)
    model.load_state_dict(trainer.state.ema.model.state_dict())
    return model


def theirs(flow: str, seed: int, data: tuple[FlowDataset, FlowDataset], name: str) -> VelocityNet:
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    kinds = {
        "icfm": cfm.ConditionalFlowMatcher,
        "otcfm": cfm.ExactOptimalTransportConditionalFlowMatcher,
    }
    matcher = kinds[flow](sigma=SIGMA)
    torch.manual_seed(seed)
    model = VelocityNet(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = data[0].data
    for _ in range(STEPS):
        optimizer.zero_grad()
        x_1 = rows[torch.randint(len(rows), (BATCH,))]
        x_0 = torch.randn_like(x_1)
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(x_0, x_1)
        loss = (model(x_t, t) - u_t).square().mean()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("flow", ["icfm", "otcfm"])
def test_both_loops_end_at_the_same_measures(
    study: Path, flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    points = toy_set("moons")
    data = FlowDataset(points[:TOY_ROWS]), FlowDataset(points[TOY_ROWS:])
    scope = Scope(n=2000, repeats=1, with_c2st=False, solver=Solver("euler", 100), euler_steps=())
    stats = {"mean": torch.zeros(2), "std": torch.ones(2)}
    found: dict[str, dict[str, list[float]]] = {}
    for loop in (ours, theirs):
        values = found[loop.__name__] = {name: [] for name in MEASURES}
        for seed in SEEDS:
            model = loop(flow, seed, data, f"{flow}{seed}").requires_grad_(False).eval()
            source = NormalSource((2,))
            trained = TrainedModel("a", model, stats, config(flow, seed), STEPS, CPU, source)
            measured = evaluate(trained, *data, scope)["measures"]
            for name in MEASURES:
                values[name].append(measured[name]["value"])
    for name in MEASURES:
        means, spreads = zip(
            *(
                (statistics.fmean(of[name]), statistics.stdev(of[name]))
                for of in (found["ours"], found["theirs"])
            ),
            strict=True,
        )
        print(f"\n{flow} {name}: ours {means[0]:.3f} ± {spreads[0]:.3f}, ", end="")
        print(f"torchcfm's loop {means[1]:.3f} ± {spreads[1]:.3f}")
        assert abs(means[0] - means[1]) <= 2 * max(spreads)
