"""Weights & Biases mirrors a run's folder. The only room that imports wandb, when a run starts."""
