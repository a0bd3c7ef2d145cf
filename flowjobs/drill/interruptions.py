"""The ways to interrupt a job that its own user has, and what each stands for."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from flowjobs.config import RestartConfig, RunConfig
from flowjobs.jobs.executors import Cluster
from flowjobs.runs.status import JobInfo
from flowjobs.slurm.controller import requeue as requeue_job
from flowjobs.slurm.controller import signal_step

Way = Literal["user signal", "TERM", "requeue", "SIGKILL", "time limit"]

SIGNALS: dict[Way, signal.Signals] = {
    "user signal": signal.SIGUSR2,
    "TERM": signal.SIGTERM,
    "SIGKILL": signal.SIGKILL,
}


@dataclass(frozen=True)
class Interruption:
    """One way.

    Attributes:
        way: Its name.
    """

    way: Way

    @property
    def run_name(self) -> str:
        """The name of the run that is interrupted so."""
        return "drill-" + self.way.lower().replace(" ", "-")

    @property
    def saves(self) -> bool:
        """Whether the run gets a chance to save."""
        return self.way != "SIGKILL"

    def prepare(self, config: RunConfig) -> RunConfig:
        """What the run must ask for, so that it is interrupted and restarted."""
        if self.way == "time limit":
            return replace(config, slurm=replace(config.slurm, timeout_min=1))
        if self.way == "SIGKILL":
            return replace(config, restarts=RestartConfig(retries=1))
        return config

    def happen_to(self, job: JobInfo) -> None:
        """Interrupt a job that trains.

        Raises:
            SubmissionError: Slurm refuses.
        """
        if self.way == "time limit":
            return  # it comes by itself
        if self.way == "requeue":
            requeue_job(job.job_id)
        elif job.cluster == "slurm":
            signal_step(job.job_id, SIGNALS[self.way])
        else:
            with suppress(ProcessLookupError):  # it has just finished
                os.kill(job.pid, SIGNALS[self.way])


def interruptions_for(
    cluster: Cluster, *, requeue: bool | None, time_limit: bool
) -> list[Interruption]:
    """The ways that there are on a cluster.

    Args:
        cluster: Where the jobs run.
        requeue: Whether jobs may be started again; None: not known.
        time_limit: Whether to wait for a time limit, which takes minutes.
    """
    ways = [
        Interruption("user signal"),  # preemption or time limit, announced by --signal
        Interruption("TERM"),  # preemption without that, or scancel of the step
        Interruption("SIGKILL"),  # a death without notice
    ]
    if cluster == "slurm" and requeue is not False:
        ways.insert(2, Interruption("requeue"))
    if cluster == "slurm" and time_limit:
        ways.append(Interruption("time limit"))
    return ways
