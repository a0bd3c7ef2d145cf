"""The seed's third check script; changed: the names of modules."""

import os
import subprocess
import sys

# Clean up any existing checkpoint
ckpt_dir = "study/checkpoints/resume-test-icfm-1k-none"
os.makedirs(ckpt_dir, exist_ok=True)

# Run 1: Train for 2 epochs
print("=== Run 1: Initial training ===")
result = subprocess.run(
    [
        *(sys.executable, "-m", "flowjobs", "train"),
        *("--arch", "resume-test", "--flow", "icfm", "--dataset", "1k"),
        *("--group", "test", "--epochs", "2", "--batch-size", "64", "--lr", "1e-3"),
        *("--wandb-project", "flow-matching-study"),
    ],
    capture_output=True,
    text=True,
    env={**os.environ, "WANDB_MODE": "offline"},
)
print(result.stdout[-500:] if len(result.stdout) > 500 else result.stdout)
if result.returncode != 0:
    print("STDERR:", result.stderr[-500:])

# Check checkpoint exists
ckpt_path = f"{ckpt_dir}/best.pt"
assert os.path.exists(ckpt_path), f"Checkpoint not found: {ckpt_path}"
print(f"Checkpoint saved: {ckpt_path}")

# Run 2: Resume and train 2 more epochs
print("\n=== Run 2: Resumed training ===")
result = subprocess.run(
    [
        *(sys.executable, "-m", "flowjobs", "train"),
        *("--arch", "resume-test", "--flow", "icfm", "--dataset", "1k"),
        *("--group", "test", "--epochs", "4", "--batch-size", "64", "--lr", "1e-3"),
        *("--resume", ckpt_path),
        *("--wandb-project", "flow-matching-study"),
    ],
    capture_output=True,
    text=True,
    env={**os.environ, "WANDB_MODE": "offline"},
)
print(result.stdout[-500:] if len(result.stdout) > 500 else result.stdout)
if result.returncode != 0:
    print("STDERR:", result.stderr[-500:])

print("Resume support OK")
