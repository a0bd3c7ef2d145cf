"""The scheduler's side: what is submitted, what runs on the node, what Slurm says of it."""
