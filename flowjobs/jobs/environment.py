"""Where this process runs: under which scheduler, as which rank of how many."""

import os
import socket
from dataclasses import dataclass

from submitit.core.job_environment import JobEnvironment
from submitit.local.debug import DebugJobEnvironment
from submitit.local.local import LocalJobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from flowjobs.jobs import slurm
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo


@dataclass(frozen=True)
class JobProcess:
    """This process as a part of its job.

    Attributes:
        job: What the run's status says of the job.
        rank: This process among all of the job, from 0.
        world_size: How many there are.
        local_rank: This process among those on its node, from 0.
    """

    job: JobInfo
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def this_process(run: Run) -> JobProcess:
    """Look up where this process runs, and set MASTER_ADDR and MASTER_PORT if it is one of many.

    A process in the foreground is a job of its own, also inside an interactive Slurm job: only
    `srun` makes ranks.
    """
    environment = _submitit_environment()
    if environment is None:
        log = run.logs / f"{socket.gethostname()}-{os.getpid()}.log"
        return JobProcess(JobInfo.in_foreground(log))
    if environment.num_tasks > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    return JobProcess(
        JobInfo(
            cluster=environment.name(),
            job_id=environment.job_id,
            log=_log_file(environment),
            host=socket.gethostname(),
            pid=os.getpid(),
            gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        ),
        rank=environment.global_rank,
        world_size=environment.num_tasks,
        local_rank=environment.local_rank,
    )


def _submitit_environment() -> JobEnvironment | None:
    # A batch script of one's own does not set what submitit goes by.
    if "SUBMITIT_EXECUTOR" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["SUBMITIT_EXECUTOR"] = "slurm"
    for kind in (DebugJobEnvironment, LocalJobEnvironment, SlurmJobEnvironment):
        environment: JobEnvironment = kind()
        if environment.activated():
            return environment
    return None


def _log_file(environment: JobEnvironment) -> str | None:
    if "SUBMITIT_FOLDER" in os.environ:
        return str(environment.paths.stdout)
    if environment.name() == "slurm":
        return slurm.job_output_file(environment.job_id)
    return None
