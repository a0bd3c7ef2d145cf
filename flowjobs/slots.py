"""The job that this process is in: whether it is a run's own, who shares it, what it was given."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

# In the environment of each run of a job that trains several at once: how many.
SLOTS = "FLOWJOBS_SLOTS"
# Set by the batch script of a job that was submitted for a run: the job's own id.
JOB_OF_RUN = "FLOWJOBS_JOB"
# The driver has a folder here for each of its GPUs.
GPUS_OF_NVIDIA = Path("/proc/driver/nvidia/gpus")
# Where a container hides that, it has the devices alone that it was given.
DEVICES = Path("/dev")


def runs_that_share(environment: Mapping[str, str] = os.environ) -> int:
    """How many runs share the job's processors, memory and GPU; 1 where it is a run's alone."""
    number = environment.get(SLOTS, "")
    return int(number) if number.isdigit() and int(number) else 1


def nvidia_gpus() -> int:
    """How many GPUs the driver of this machine knows. Looked up without loading torch."""
    if gpus := len(list(GPUS_OF_NVIDIA.glob("*"))):
        return gpus
    return len(list(DEVICES.glob("nvidia[0-9]*"))) if _has_driver() else 0


def _has_driver() -> bool:
    """Whether a process here can use a GPU: devices may be left of a driver that is gone."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def in_slurm_job() -> bool:
    """Whether this process is in a Slurm job, whoever submitted it."""
    return "SLURM_JOB_ID" in os.environ


def gpus_given() -> bool:
    """Whether Slurm gave the job, or this step of it, GPUs. It says so where the driver is gone."""
    return "SLURM_JOB_GPUS" in os.environ or "SLURM_STEP_GPUS" in os.environ


def nodes_of_step(environment: Mapping[str, str]) -> int:
    """How many nodes the ranks are on; 1 outside Slurm."""
    return int(environment.get("SLURM_STEP_NUM_NODES", "1"))


def cores_given(ranks_here: int, environment: Mapping[str, str]) -> int | None:
    """How many cores Slurm gave each of a node's ranks; None where it does not say."""
    if "SLURM_CPUS_PER_TASK" in environment:
        return int(environment["SLURM_CPUS_PER_TASK"])
    if "SLURM_CPUS_ON_NODE" in environment:
        return int(environment["SLURM_CPUS_ON_NODE"]) // ranks_here
    return None


def submitted_for_run(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the Slurm job that this process is in was submitted for a run.

    By flowjobs or with sbatch/*.sh, whose batch script says so of its own job. The id is compared,
    since jobs that are submitted from inside such a job inherit its variables. In any other job (a
    shell of salloc's, a notebook, somebody's own batch script) this process is a guest: the job
    is not requeued, submitted again or moved to another node for its sake.
    """
    return environment.get(JOB_OF_RUN, "") == environment.get("SLURM_JOB_ID")
