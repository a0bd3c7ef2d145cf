"""What a run computes with: ranks, threads, device. Beside the config, it decides the bits.

A sum over four threads or ranks is another one, in its last bits, than over two. So a run keeps
what it began with where it can, and says so where it cannot.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowjobs.cgroups import control_groups
from flowjobs.slots import cores_given, nodes_of_step, runs_that_share, submitted_for_run
from flowjobs.training.ranks import Ranks

logger = logging.getLogger(__name__)

# What the forward pass of a step must have for each thread, in FLOPs. Below that the threads wait
# for one another for longer than they compute: the default model on 64 rows has 80 million and
# takes 2.4 s with one thread, 2.0 with two, 5.9 with two where others want the cores too; one of
# 2.5 million parameters on 512 rows (2.6 billion) takes 2.5 with one and 1.7 with two.
FLOPS_PER_THREAD = 1_000_000_000
# The same where the cores are this run's and no other's, in a job that was submitted for it: there
# two threads are as fast as 1.15 of one at 45 million for each, as 1.5 at 150 million, as 1.8 at a
# billion.
FLOPS_PER_OWN_CORE = 50_000_000


@dataclass(frozen=True)
class Compute:
    """What a run computes with, as a checkpoint notes it.

    Attributes:
        ranks: Processes that share a step.
        threads: How many each rank has for operations on the CPU.
        device: The GPU's name, or "cpu" with what its instructions can do.
        torch: Version.
    """

    ranks: int
    threads: int
    device: str
    torch: str

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dataclasses.asdict(self)


# What makes the next start compute like the one before.
WHAT_TO_DO = {
    "ranks": "ask for as many (--nodes, --gpus-per-node)",
    "threads": "set OMP_NUM_THREADS to the former number",
    "device": "keep the run on nodes of one type (--constraint, --gpu-type)",
    "torch": "start it in the environment it began in",
}


@contextmanager
def computing(
    ranks: Ranks, flops: int, environment: Mapping[str, str] = os.environ
) -> Iterator[Compute]:
    """Compute with as many threads as help and may be used, while the block lasts.

    Args:
        ranks: The processes that train together.
        flops: FLOPs of the forward pass of this rank's part of a step (`flops_of_batch`).
        environment: OMP_NUM_THREADS is obeyed; a job's says how many cores it was given.
    """
    before, threads = torch.get_num_threads(), threads_for(ranks, flops, environment)
    torch.set_num_threads(threads)
    try:
        yield Compute(ranks.world_size, threads, _name_of(ranks.device), str(torch.__version__))
    finally:
        torch.set_num_threads(before)


def threads_for(ranks: Ranks, flops: int, environment: Mapping[str, str] = os.environ) -> int:
    """How many threads help and may be used; the arguments are those of `computing`."""
    if asked := threads_asked_for(environment):
        return asked
    threads = usable_cores(ranks.world_size, environment=environment)
    if ranks.device.type == "cpu":
        own = cores_given(1, environment) is not None and submitted_for_run(environment)
        each = FLOPS_PER_OWN_CORE if own else FLOPS_PER_THREAD
        threads = min(threads, max(1, flops // each))
    return threads


def computing_as_before(
    now: Compute, before: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> Compute:
    """Use as many threads as the run had before, and log what else has changed.

    Args:
        now: What this start computes with.
        before: `Compute.to_dict` of the start that wrote the checkpoint; empty if it did not say.
        environment: An OMP_NUM_THREADS is obeyed all the same.
    """
    if threads_asked_for(environment) is None and "threads" in before:
        now = dataclasses.replace(now, threads=before["threads"])
        torch.set_num_threads(now.threads)
    for name, value in now.to_dict().items():
        irrelevant = name == "threads" and not now.device.startswith("cpu")
        if before.get(name, value) != value and not irrelevant:
            logger.warning(
                "so far this run used %s %s, now %s: it resumes, but its bits will differ from an "
                "uninterrupted run; to avoid that, %s",
                *(name, before[name], value, WHAT_TO_DO[name]),
            )
    return now


def threads_asked_for(environment: Mapping[str, str]) -> int | None:
    """The number in OMP_NUM_THREADS; of a list, one a level, the outermost."""
    number = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(number) if number.isdigit() and int(number) else None


def usable_cores(
    world_size: int, root: Path = Path("/"), environment: Mapping[str, str] = os.environ
) -> int:
    """Cores that a rank may use: of its affinity, its control groups and its job, the fewest.

    Runs that share a job have equal parts.

    Args:
        world_size: Ranks of the run.
        root: Where /proc and /sys are.
        environment: Says how many cores the job was given.
    """
    cores = _cores_of_rank(world_size, root, environment)
    return max(1, cores // runs_that_share(environment))


def _cores_of_rank(world_size: int, root: Path, environment: Mapping[str, str]) -> int:
    has = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    cores = min([len(has), *_quotas(root)])
    ranks_here = math.ceil(world_size / nodes_of_step(environment))
    given = cores_given(ranks_here, environment)
    # Where Slurm binds no task to its cores, each sees all of them.
    return max(1, cores // ranks_here if given is None else min(cores, given))


def _quotas(root: Path) -> Iterator[int]:
    """The processors that each control group's quota of time comes to."""
    for folder, version in control_groups(root, "cpu"):
        files = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        if all((folder / name).exists() for name in files):
            quota, period = " ".join((folder / name).read_text() for name in files).split()
            if quota not in ("max", "-1"):
                yield math.ceil(int(quota) / int(period))


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # MKL and oneDNN choose their way by what the processor can do.
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
