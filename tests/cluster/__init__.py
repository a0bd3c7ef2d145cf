"""A real Slurm cluster on one machine, for tests and for trying things out by hand.

`python -m tests.cluster up` boots it; `SlurmCluster` in `slurm.py` is what tests use. Only the
standard library is needed. Nothing here knows flowjobs.
"""
