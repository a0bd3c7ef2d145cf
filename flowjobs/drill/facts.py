"""What a cluster does to jobs, as it says itself, and what to set where that falls short."""

import os
from dataclasses import dataclass

from flowjobs.drill.probe import NodeAnswer
from flowjobs.slurm.cluster import cluster_settings, partition_settings, qos_settings
from flowjobs.slurm.controller import job_record
from flowjobs.slurm.sacct import accounting_answers


@dataclass(frozen=True)
class ClusterFacts:
    """Cluster settings that affect a job; None = unknown.

    Attributes:
        scheduler: With its version.
        partition: The job's.
        preempt_type: Who preempts whom: PreemptType.
        preempt_mode: What becomes of a job that is preempted: REQUEUE, CANCEL, …; OFF.
        grace_s: GraceTime: from the first signal of a preemption to the last, in seconds.
        kill_wait_s: KillWait: from the last signal to SIGKILL, in seconds.
        user_signal: Whether a preempted job gets the signal of --signal first.
        job_requeue: The cluster's default of whether a job may be started again: JobRequeue.
        requeue: Whether this job may be.
        accounting: Whether accounting answers.
        study: The study's folder.
        here: This host.
        node: What the node says; None: nothing arrived.
    """

    scheduler: str
    study: str
    here: str
    partition: str | None = None
    preempt_type: str | None = None
    preempt_mode: str | None = None
    grace_s: float | None = None
    kill_wait_s: float | None = None
    user_signal: bool | None = None
    job_requeue: bool | None = None
    requeue: bool | None = None
    accounting: bool | None = None
    node: NodeAnswer | None = None

    @property
    def preempts(self) -> bool:
        """Whether a job may be preempted, as far as is known."""
        return self.preempt_mode not in (None, "OFF")

    @property
    def notice_s(self) -> float | None:
        """From the first signal of a preemption to SIGKILL, in seconds."""
        if self.kill_wait_s is None:
            return None
        return self.kill_wait_s + ((self.grace_s or 0.0) if self.preempts else 0.0)


@dataclass(frozen=True)
class Shortfall:
    """Something that is not as good as it could be.

    Attributes:
        what: What is so, what follows, and what to set.
        breaks: Whether a promise does not hold because of it.
    """

    what: str
    breaks: bool = False


def facts_of_slurm(job_id: str, study: str) -> ClusterFacts:
    """What Slurm says of itself and of a job of ours that is in the queue."""
    settings = cluster_settings()
    record = job_record(job_id)
    job = record.fields if record else {}
    partition = partition_settings(job.get("Partition", ""))
    preempt_type = settings.get("PreemptType")
    mode, grace = partition.get("PreemptMode"), partition.get("GraceTime")
    if preempt_type == "preempt/none":
        mode = "OFF"
    elif preempt_type == "preempt/qos":
        qos = qos_settings(job.get("QOS", ""))
        mode, grace = qos.get("PreemptMode"), qos.get("GraceTime")
        if mode == "cluster":
            mode = settings.get("PreemptMode")
    parameters = settings.get("SlurmctldParameters")
    requeue_default = settings.get("JobRequeue")
    return ClusterFacts(
        scheduler=f"Slurm {settings.get('SLURM_VERSION', 'of unknown version')}",
        study=study,
        here=os.uname().nodename,
        partition=job.get("Partition"),
        preempt_type=preempt_type,
        preempt_mode=mode.upper() if mode else None,
        grace_s=_seconds(grace),
        kill_wait_s=_seconds(settings.get("KillWait", "").partition(" ")[0]),
        user_signal=None if parameters is None else "preempt_send_user_signal" in parameters,
        job_requeue=None if requeue_default is None else requeue_default == "1",
        requeue=record.requeue if record else None,
        accounting=accounting_answers(),
    )


def facts_of_this_machine(study: str) -> ClusterFacts:
    """Where submitit's local executor starts the jobs, nobody preempts them."""
    here = os.uname().nodename
    return ClusterFacts("this machine", study, here, preempt_mode="OFF")


def shortfalls(facts: ClusterFacts) -> list[Shortfall]:
    """Which facts break a promise, and what to set."""
    found = []
    if facts.preempts and facts.grace_s == 0:
        found.append(
            Shortfall(
                "GraceTime 0: a preempted job has KillWait alone to save in; where that is too "
                "short, the steps since the last checkpoint are done again: "
                "--checkpoint-every-s 30"
            )
        )
    if facts.preempt_mode == "CANCEL":
        found.append(
            Shortfall(
                "PreemptMode CANCEL: a preempted run continues as a new job, with the place in the "
                "queue of a new job"
            )
        )
    if facts.requeue is False:
        found.append(
            Shortfall(
                "requeuing is forbidden for the job: runs continue under new job ids; to keep the "
                "id, submit without --sbatch no-requeue=True"
            )
        )
    if facts.accounting is False:
        found.append(
            Shortfall(
                "no accounting (sacct does not answer): the reason of a sudden death is taken from "
                "the log and the exit code alone"
            )
        )
    return found + _shortfalls_of_node(facts)


def _shortfalls_of_node(facts: ClusterFacts) -> list[Shortfall]:
    node = facts.node
    if node is None:
        return [
            Shortfall(
                f"a job could not write to {facts.study}: put the study on a file system that the "
                "nodes share with this host (--study)",
                breaks=True,
            )
        ]
    found = []
    if not node.commands and facts.scheduler != "this machine":
        found.append(
            Shortfall(
                f"Slurm cannot be asked from {node.host} ({node.why}): a run that Slurm does not "
                "requeue by itself, at the time limit say, does not resume: ask the administrators "
                "to let jobs use scontrol and sbatch, or submit it again",
                breaks=True,
            )
        )
    if not node.locks:
        found.append(
            Shortfall(
                f"file locks do not hold between {facts.here} and {node.host}: Slurm's word alone "
                "keeps two jobs from training one run; put the study on a file system with locks "
                "(--study), or have this one mounted with them (flock)",
                breaks=True,
            )
        )
    return found


def _seconds(text: str | None) -> float | None:
    """Seconds of "30", "00:00:30" or "1-00:00:00"; None for a word."""
    days, _, clock = (text or "").rpartition("-")
    try:
        seconds = 86_400.0 * float(days or 0)
        for weight, part in zip((1, 60, 3600), reversed(clock.split(":")), strict=False):
            seconds += weight * float(part)
        return seconds
    except ValueError:
        return None
