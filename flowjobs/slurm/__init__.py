"""Query and control Slurm through its commands. Knows no run.

Each function says which forms of Slurm's commands can be relied on, and why not the others.
"""
