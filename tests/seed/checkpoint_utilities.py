"""The seed's first check script; changed: the names of modules."""

import os
import tempfile

import torch
from torch import nn

from flowjobs.training import (
    EMAModel,
    get_checkpoint_path,
    get_cosine_schedule_with_warmup,
    load_checkpoint,
    save_checkpoint,
)

# Create dummy model and states
model = nn.Linear(10, 10)
ema = EMAModel(model, decay=0.9999)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = get_cosine_schedule_with_warmup(optimizer, 10, 100)

# Step a few times
for _ in range(20):
    scheduler.step()

# Save checkpoint
with tempfile.TemporaryDirectory() as tmpdir:
    path = os.path.join(tmpdir, "test/best.pt")
    save_checkpoint(
        path=path,
        epoch=5,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        best_loss=0.123,
        config={"test": True},
        stats={"mean": torch.zeros(10), "std": torch.ones(10)},
    )
    assert os.path.exists(path)
    print(f"Checkpoint saved: {os.path.getsize(path)} bytes")

    # Load checkpoint
    model2 = nn.Linear(10, 10)
    ema2 = EMAModel(model2, decay=0.9999)
    optimizer2 = torch.optim.AdamW(model2.parameters(), lr=1e-3)
    scheduler2 = get_cosine_schedule_with_warmup(optimizer2, 10, 100)

    start_epoch, best_loss = load_checkpoint(
        path, model2, ema2, optimizer2, scheduler2, torch.device("cpu")
    )

    assert start_epoch == 6  # epoch + 1
    assert abs(best_loss - 0.123) < 1e-6
    assert scheduler2.last_epoch == 20  # Restored from saved state
    print(f"Loaded: start_epoch={start_epoch}, best_loss={best_loss}")

# Test path generation
path = get_checkpoint_path("mlp-icfm-5k-none")
assert path == "study/checkpoints/mlp-icfm-5k-none/best.pt"
print(f"Path: {path}")

print("Checkpoint utilities OK")
