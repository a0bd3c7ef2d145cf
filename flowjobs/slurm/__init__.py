"""Query and control Slurm through its commands. Knows no run.

Comments say which forms of Slurm's commands are reliable, and why the others are not.
"""
