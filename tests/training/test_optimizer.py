"""The optimizer of a run is torch's, and light to load."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from flowjobs.training.optimizer import LightAdamW

A_RUN = """
import sys, torch
from flowjobs.config import TrainingConfig
from flowjobs.field_values import KeyValues
from flowjobs.training import FlowDataset, FlowTrainer
from flowjobs.models.build import build_model
config = TrainingConfig(epochs=2, arch_args=KeyValues(width=16, depth=1))
data = FlowDataset(torch.randn(200, 4))
for _ in range(2):  # the second one restores the first one's state
    FlowTrainer(build_model(config, 4), config, data, data, torch.device("cpu")).train()
print({name for name in ("torch._dynamo", "scipy", "torchdiffeq", "wandb") if name in sys.modules})
"""


def test_light_adamw_is_adamw() -> None:
    weights = []
    for cls in (LightAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Linear(7, 5)
        state = None
        for _ in range(2):
            optimizer = cls(model.parameters(), lr=1e-2, fused=True)
            if state is not None:
                optimizer.load_state_dict(state)
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(3, 7)).square().sum().backward()
                optimizer.step()
            state = optimizer.state_dict()
        weights.append(model.weight)
    assert torch.equal(weights[0], weights[1])
    assert weights[0].requires_grad


def test_a_step_loads_neither_dynamo_nor_scipy(workplace: Path) -> None:
    command = [sys.executable, "-c", A_RUN]
    environment = os.environ | {"WANDB_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "set()\n"
