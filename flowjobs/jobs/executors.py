"""submitit's executors, each given what a run asks of its cluster."""

import os
from pathlib import Path
from typing import Any, Literal

from submitit.core.core import Executor
from submitit.local.debug import DebugExecutor
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

from flowjobs.config import SlurmConfig
from flowjobs.errors import ConfigError, SubmissionError
from flowjobs.jobs import slurm
from flowjobs.runs.run import Run

Cluster = Literal["slurm", "local", "debug"]

# submitit's local executor ends a job after two minutes unless told otherwise.
NO_LIMIT_MIN = 60 * 24 * 365
GPUS_OF_NVIDIA = Path("/proc/driver/nvidia/gpus")


def choose_cluster(asked: Literal["auto", "slurm", "local", "debug"]) -> tuple[Cluster, str]:
    """The cluster to submit to, and why, in words for a person.

    Raises:
        SubmissionError: Slurm was asked for and does not answer.
    """
    if asked in ("local", "debug"):
        return asked, f"--cluster {asked}"
    answers, why = slurm.controller_answers()
    if asked == "slurm" and not answers:
        raise SubmissionError(
            f"--cluster slurm: {why}; submit from a login node, or use --cluster local"
        )
    return ("slurm", why) if answers else ("local", why)


class SlurmExecutorAnywhere(SlurmExecutor):
    """submitit's, which can also be made where there is no Slurm, to look at its batch file."""

    @classmethod
    def affinity(cls) -> int:
        """See submitit; `choose_cluster` has asked the controller by then."""
        return 2

    def batch_file(self) -> str:
        """The text that a submission hands to sbatch."""
        return str(self._make_submission_file_text(self._submitit_command_str, uid=""))


def make_executor(cluster: Cluster, run: Run, asked: SlurmConfig) -> Executor:
    """An executor whose batch files and logs are in the run's folder."""
    match cluster:
        case "slurm":
            return slurm_executor(run, asked)
        case "local":
            return _local_executor(run, asked)
        case "debug":
            return DebugExecutor(folder=run.logs)


def slurm_executor(run: Run, asked: SlurmConfig) -> SlurmExecutorAnywhere:
    """The executor for Slurm.

    Not submitit's AutoExecutor: that one cannot leave out what submitit sets by default, a wckey
    and a time limit of five minutes.
    """
    options = dict(asked.sbatch)
    if "no-requeue" not in options:
        options = {"requeue": True, **options}
    # srun no longer takes over --cpus-per-task from sbatch since Slurm 22.05.
    srun_args = [f"--cpus-per-task={asked.cpus_per_task}"] if asked.cpus_per_task else []
    memory = asked.mem_gb
    typed = f"{asked.gpu_type}:{asked.gpus_per_node}" if asked.gpu_type else asked.gpus_per_node
    gpus = typed if asked.gpus_per_node else None
    parameters: dict[str, Any] = {
        "job_name": run.name,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "exclude": asked.exclude,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_per_node,
        "gpus_per_node": gpus,
        "cpus_per_task": asked.cpus_per_task,
        "mem": None if memory is None else f"{round(memory * 1024)}M",
        "time": asked.timeout_min,
        "signal_delay_s": asked.signal_before_end_s,
        "comment": asked.comment,
        "wckey": None,
        "stderr_to_stdout": True,
        "srun_args": srun_args,
        "additional_parameters": options,
    }
    executor = SlurmExecutorAnywhere(folder=run.logs)
    executor.update_parameters(**parameters)
    return executor


def check_local(asked: SlurmConfig) -> list[int]:
    """The GPUs that a job on this machine gets.

    Raises:
        ConfigError: More is asked for than this machine has.
    """
    if asked.nodes > 1:
        raise ConfigError(f"--nodes: found {asked.nodes}; without Slurm there is this machine only")
    visible = visible_gpus()
    # The default of one GPU means "if there is one"; more than there are is a mistake.
    if asked.gpus_per_node > max(1, len(visible)):
        raise ConfigError(
            f"--gpus-per-node: found {asked.gpus_per_node}, this machine has {len(visible)}"
        )
    return visible[: asked.gpus_per_node]


def _local_executor(run: Run, asked: SlurmConfig) -> LocalExecutor:
    gpus = check_local(asked)
    executor = LocalExecutor(folder=run.logs)
    executor.update_parameters(
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
        tasks_per_node=max(1, len(gpus)),
        timeout_min=asked.timeout_min or NO_LIMIT_MIN,
        signal_delay_s=asked.signal_before_end_s,
        stderr_to_stdout=True,
    )
    return executor


def visible_gpus() -> list[int]:
    """The GPUs of this machine that a job may use. Looked up without loading torch."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        entries = [entry.strip() for entry in asked.split(",") if entry.strip()]
        if not all(entry.isdigit() for entry in entries):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={asked}: submitit's local executor takes indices (0,1) only"
            )
        return [int(entry) for entry in entries]
    return list(range(len(list(GPUS_OF_NVIDIA.glob("*")))))
