"""Weights & Biases behind a small protocol. The only room that imports wandb, when a run starts."""
