"""What Slurm's controller knows of jobs, and what it can be asked to do with one."""

import logging
import os
import re
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from flowjobs.errors import SubmissionError
from flowjobs.slurm.client import (
    MARK,
    SEPARATOR,
    STEP_SIGNALS,
    cells_of,
    first_line,
    run_command,
    timestamp,
)
from flowjobs.slurm.cluster import FIELD
from flowjobs.slurm.requested import starts_without

logger = logging.getLogger(__name__)

# States of a job that will not run any more, unless it is requeued by hand.
ENDED = frozenset(
    {
        *("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "BOOT_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "DEADLINE"),
    }
)

# What the clusters of a federation but one say of a job: that one has it.
REVOKED = "REVOKED"

# States of a job that has no process now, and may get one again: it waits, is held as it was
# requeued, stands still for another job or an administrator, or its nodes are booted.
WAITS = frozenset(
    {
        *("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
        *("SUSPENDED", "STOPPED", "CONFIGURING"),
    }
)

# What fits on a command line.
CANCELLED_AT_ONCE = 1000
CANCELLED_SHOWN = 3

# "7_0,4-9: No error", and of tasks that have ended "7_1-3: Job has already finished".
OF_TASKS = re.compile(r"\d+(?:_\S+)?: (.+)")
CHANGED_OR_ENDED = ("No error", "Job has already finished")

# Several "Key=value" on a line: a value may hold spaces, so it ends where the next key begins.
# These have a line of their own, and may hold anything.
_LINES_OF_THEIR_OWN = ("Command=", "WorkDir=", "StdOut=", "StdErr=", "StdIn=", "Comment=")


@dataclass(frozen=True)
class JobRow:
    """One line on a job: as the controller has it, or one start of it in accounting.

    Attributes:
        job_id: As submitted (`12_3` for an array task; of tasks that wait still together,
            accounting has `12_[3-5]` or `12`).
        state: First word of it: "CANCELLED" of "CANCELLED by 0".
        uid: Its user's.
        cluster: Slurm's name of the cluster.
        name: The job's.
        submitted: When it was submitted or requeued, in seconds of the epoch.
        ended: When it ended, if it has; of a job that runs the controller says when it would.
        exit_code: The batch script's; accounting has that of its steps.
        signal: That killed it, or 0.
        nodes: NodeList.
        restarts: How often Slurm has started it again, or is about to; None in accounting.
        log: Where its output goes, before Slurm fills in `%j` and such; empty in accounting.
        marks: Ours, in its comment or on sbatch's command line.
        reason: Why it waits, in Slurm's word.
        starts: When it starts, as far as Slurm knows.
        dependency: The jobs that it waits for.
    """

    job_id: str
    state: str
    uid: int
    cluster: str
    name: str
    submitted: float
    ended: float | None = None
    exit_code: int = 0
    signal: int = 0
    nodes: str = ""
    restarts: int | None = None
    log: str = ""
    marks: frozenset[str] = frozenset()
    reason: str = ""
    starts: float | None = None
    dependency: str = ""

    @property
    def waits(self) -> bool:
        """Whether it waits for something before it computes (on)."""
        return self.state in WAITS

    def logs_to(self, folder: Path) -> bool:
        """Whether its output goes to a folder, by whatever path either of them is spelled."""
        there = Path(self.log.replace("%%", "%")).parent  # with %j and such in its name
        if there == folder or there.name != folder.name:
            return there == folder
        try:
            return there.is_absolute() and os.path.samefile(there, folder)
        except OSError:  # moved since, or away
            return False


def queue(uids: Collection[int]) -> list[JobRow]:
    """The jobs of these users that the controller knows: all that wait or run, and for some
    minutes (MinJobAge) those that have ended. Those of other users only where jobs are not private.

    Raises:
        SubmissionError: Slurm does not answer.
    """
    # Not --json: it ignores -j in Slurm 22.05. Not -j: it fails for a job that has been forgotten,
    # which cannot be told from a controller that is away. -r lists the tasks of an array.
    fields = (
        *("JobArrayID", "State", "UserID", "Cluster", "SubmitTime", "EndTime", "exit_code"),
        *(
            "NodeList",
            "RestartCnt",
            "Reason",
            "StartTime",
            "Dependency",
            "STDOUT",
            "Name",
            "Comment",
        ),
    )
    answer = run_command(
        *("squeue", "-h", "-a", "-r", "-t", "all", "-u", ",".join(map(str, sorted(uids)))),
        *("-O", ",".join(f"{field}:{SEPARATOR}" for field in fields)),
    )
    if answer.returncode != 0:
        raise SubmissionError(f"Slurm does not say which jobs there are: {first_line(answer)}")
    rows = []
    for cells in cells_of(answer.stdout, len(fields)):
        job_id, state, uid, cluster, submitted, ended, code, nodes, restarts, *rest = cells
        reason, starts, dependency, log, name, comment = rest
        status = int(code) if code.isdigit() else 0  # as of wait()
        rows.append(
            JobRow(
                job_id=job_id,
                state=state,
                uid=int(uid) if uid.isdigit() else -1,
                cluster="" if cluster in ("N/A", "(null)") else cluster,
                name=name,
                submitted=timestamp(submitted) or 0.0,
                ended=timestamp(ended),
                exit_code=0 if status & 0x7F else status >> 8,
                signal=status & 0x7F,
                nodes=nodes,
                restarts=int(restarts) if restarts.isdigit() else 0,
                log=log,
                marks=frozenset(MARK.findall(f"{comment} {log}")),
                reason=reason,
                starts=timestamp(starts),
                dependency="" if dependency == "(null)" else dependency,
            )
        )
    return rows


@dataclass(frozen=True)
class JobRecord:
    """What the controller says of one job (`scontrol show job`).

    Attributes:
        state: "RUNNING", "COMPLETING", "PENDING", …
        restarts: How often Slurm has started the job again, or is about to.
        preempted: Whether its place was given to another job.
        seconds_left: Until Slurm kills it: to the time limit, or to the end of the grace; None if
            Slurm does not say: of a job without a time limit it says neither.
        requeue: Whether Slurm may start it again.
        submitted: When it was submitted, or requeued, in seconds of the epoch.
        fields: All fields, by scontrol's names.
    """

    state: str
    restarts: int
    preempted: bool
    seconds_left: float | None
    requeue: bool
    submitted: float
    fields: Mapping[str, str]

    @property
    def over_limit(self) -> bool:
        """Whether Slurm ends it for its time: at its own limit, at the end of its reservation, or
        as the hours of its account or QOS are used up."""
        # Not by the times on record: its own limit is not the only one, and a partition may let it
        # run over that (OverTimeLimit), where a scancel is still one.
        return self.fields.get("Reason") == "TimeLimit"

    @property
    def lost_a_node(self) -> bool:
        """Whether it ends because a node of it is gone."""
        return self.state == "NODE_FAIL" or self.fields.get("Reason") == "NodeDown"

    @property
    def cancelled(self) -> bool:
        """Whether it ends because somebody cancelled it: for no other reason that Slurm has."""
        other = self.preempted or self.over_limit or self.lost_a_node
        return self.state in ("COMPLETING", "CANCELLED") and not other


def job_record(job_id: str) -> JobRecord | None:
    """The controller's record of a job; None where it does not know the job.

    Raises:
        SubmissionError: Slurm does not answer.
    """
    answer = run_command("scontrol", "show", "job", job_id)
    if answer.returncode != 0 and "Invalid job id" in answer.stderr:
        return None
    _, found, record = answer.stdout.partition("JobId=")  # after a banner, if there is one
    if answer.returncode != 0 or "JobState=" not in record:
        raise SubmissionError(f"Slurm says nothing of job {job_id}: {first_line(answer)}")
    fields: dict[str, str] = {}
    # For an array it prints all tasks, a block each.
    for line in (found + record).partition("\n\n")[0].splitlines():
        if line.lstrip().startswith(_LINES_OF_THEIR_OWN):
            key, _, value = line.lstrip().partition("=")
            fields[key] = value
            continue
        for key, value in FIELD.findall(line):
            fields.setdefault(key, value)
    end = timestamp(fields.get("EndTime"))
    return JobRecord(
        state=fields.get("JobState", "").split()[0],
        restarts=int(fields.get("Restarts", "0")),
        preempted=timestamp(fields.get("PreemptTime")) is not None,
        seconds_left=None if end is None else end - time.time(),
        requeue=fields.get("Requeue") == "1",
        submitted=timestamp(fields.get("SubmitTime")) or 0.0,
        fields=fields,
    )


def requeue(job_id: str, exclude: str | None = None) -> None:
    """Have Slurm kill the job and start it again under the same id.

    **This brings back a job that its user has just cancelled**: look at its record first.

    Args:
        job_id: A job that runs; usually this process's own.
        exclude: A node that it should not start on again, if another one can start it.

    Raises:
        SubmissionError: Slurm refuses (requeuing is forbidden for the job), or does not answer.
    """
    nodes = _without(job_id, exclude) if exclude else ""
    # The job that is requeued is told to end at once, and may be the one that asks.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STEP_SIGNALS)
    try:
        answer = run_command("scontrol", "requeue", job_id)
        if answer.returncode != 0:
            raise SubmissionError(first_line(answer))
        if nodes:
            # Requeued, it is a job that waits, and may be changed. The list is replaced.
            run_command("scontrol", "update", f"jobid={job_id}", f"ExcNodeList={nodes}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _without(job_id: str, node: str) -> str:
    """All nodes that a job would leave out with one more; empty if it would then never start."""
    record = job_record(job_id)
    if record is None:
        return ""
    before = record.fields.get("ExcNodeList", "(null)")
    nodes = node if before == "(null)" else f"{before},{node}"
    if starts_without(nodes, record.fields):
        return nodes
    logger.info("job %s may start on %s again: no other node has what it asks for", job_id, node)
    return ""


def start_soon(job_id: str) -> None:
    """Let a job of one's own that is requeued start in some seconds, where that is allowed.

    Slurm lets it wait for two minutes by default. Not at once: a node that still knows the job's
    earlier start refuses it, or is drained ("Duplicate jobid").
    """
    run_command("scontrol", "update", f"jobid={job_id}", "StartTime=now+3")


def signal_step(job_id: str, number: signal.Signals) -> None:
    """Send a signal to the processes of a job's first step, and not to its batch script.

    Raises:
        SubmissionError: Slurm does not answer, or refuses.
    """
    name = number.name.removeprefix("SIG")
    answer = run_command("scancel", f"--signal={name}", f"{job_id}.0")
    if answer.returncode != 0:
        raise SubmissionError(f"scancel --signal={name} {job_id}.0: {first_line(answer)}")


def write_batch_script(job_id: str, path: str) -> bool:
    """Copy the script that a job was submitted with to `path`; False if Slurm does not give it."""
    return run_command("scontrol", "write", "batch_script", job_id, path).returncode == 0


def cancel(*job_ids: str) -> None:
    """Cancel jobs; one that is gone already is no error. Look first whether they are those meant.

    Raises:
        SubmissionError: Slurm does not answer, or refuses.
    """
    for start in range(0, len(job_ids), CANCELLED_AT_ONCE):
        answer = run_command("scancel", *job_ids[start : start + CANCELLED_AT_ONCE])
        errors = [line for line in answer.stderr.splitlines() if "error" in line.lower()]
        if answer.returncode != 0 and not (
            errors and all("Invalid job id" in line for line in errors)
        ):
            names = " ".join(job_ids[:CANCELLED_SHOWN])
            raise SubmissionError(f"scancel {names}: {first_line(answer)}")


def set_parallel(job_id: str, tasks: int) -> None:
    """Have an array run so many tasks at a time from now on.

    Raises:
        SubmissionError: Slurm does not answer, or refuses.
    """
    answer = run_command("scontrol", "update", f"jobid={job_id}", f"ArrayTaskThrottle={tasks}")
    # Once a task has ended there is a line for each kind of task, and an exit code of 1.
    lines = [OF_TASKS.fullmatch(line) for line in answer.stderr.splitlines()]
    said = [line[1] for line in lines if line]
    if answer.returncode != 0 and not (said and {*said} <= {*CHANGED_OR_ENDED}):
        raise SubmissionError(f"job {job_id} keeps its number of tasks: {first_line(answer)}")
