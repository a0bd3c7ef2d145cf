"""The seed's second check script; changed: the names of modules."""

import os

import torch
from torch import nn

from flowjobs.training import FlowDataset, FlowTrainer, TrainingConfig


# Simple velocity network
class SimpleVelocityNet(nn.Module):
    def __init__(self, dim=1024, hidden=256):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim + 1, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim),
        )

    def forward(self, x, t):
        t = t.unsqueeze(-1) if t.dim() == 1 else t
        return self.net(torch.cat([x, t], dim=-1))


# Load small dataset
train_ds = FlowDataset("study/datasets/splits/1k/train.pt")
val_ds = FlowDataset("study/datasets/splits/1k/val.pt")

# Create config
config = TrainingConfig(
    arch="test",
    flow="icfm",
    dataset="1k",
    aug="none",
    group="test",
    epochs=2,
    batch_size=64,
    lr=1e-3,
    warmup_steps=10,
    patience=5,
)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = SimpleVelocityNet()

# Train with Wandb (offline mode)
trainer = FlowTrainer(model, config, train_ds, val_ds, device, wandb_project="flow-matching-study")

result = trainer.train()
print(f"Trained {result['epochs_run']} epochs")
print(f"Best val loss: {result['best_val_loss']:.4f}")

# Check checkpoint was saved
ckpt_path = "study/checkpoints/test-icfm-1k-none/best.pt"
if os.path.exists(ckpt_path):
    print(f"Checkpoint saved: {os.path.getsize(ckpt_path)} bytes")
else:
    print("WARNING: Checkpoint not saved (may be OK if no improvement)")

print("Wandb integration OK")
