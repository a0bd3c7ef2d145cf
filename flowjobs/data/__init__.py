"""Training data: files, their rows, and the batches of a step."""
