"""Asking Slurm, and asking it for things. Robust forms only: see each function for the traps."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flowjobs.errors import SubmissionError
from flowjobs.jobs.sbatch_environment import minutes

# In the environment of a job that flowjobs itself submitted: the id of the job it goes on from.
CONTINUES = "FLOWJOBS_CONTINUES"

# What Slurm tells every process of a step.
STEP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

# Clients wait MessageTimeout (10 s by default) for a controller that is away.
CLIENT_TIMEOUT_S = 30


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("scontrol") is not None


def controller_answers() -> tuple[bool, str]:
    """Whether jobs can be submitted to Slurm from here, and why not, in words for a person."""
    if shutil.which("sbatch") is None:
        return False, "sbatch is not on PATH"
    answer = _run("scontrol", "ping")
    if answer.returncode != 0 or "UP" not in answer.stdout:
        return False, f"sbatch is there, but no controller answers: {_first_line(answer)}"
    return True, "sbatch is there and the controller answers"


def partitions() -> list[str]:
    """The names of the cluster's partitions; none if it does not answer."""
    answer = _run("sinfo", "--noheader", "--format=%R")
    return sorted(set(answer.stdout.split())) if answer.returncode == 0 else []


def queue() -> dict[str, tuple[str, str]]:
    """State ("PENDING", "RUNNING", …) and name of each of this user's jobs in the queue, by id.

    Raises:
        SubmissionError: Slurm does not answer.
    """
    # Not --json: it ignores -j in Slurm 22.05. Not -j: it fails for a job that has been forgotten,
    # which cannot be told from a controller that is away. -r lists the tasks of an array.
    answer = _run("squeue", "-h", "-a", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%j")
    if answer.returncode != 0:
        raise SubmissionError(f"Slurm does not say which jobs there are: {_first_line(answer)}")
    found = {}
    for line in answer.stdout.splitlines():
        if line.count("|") >= 2:  # with several clusters there are headings
            job_id, state, name = line.strip().split("|", 2)
            found[job_id] = (state, name)
    return found


def queued_state(job_id: str, job_name: str) -> str | None:
    """The state of a job in the queue, or None if it is not there.

    The name is compared too, since a cluster may use an id again after a crash.

    Raises:
        SubmissionError: Slurm does not answer.
    """
    state, name = queue().get(job_id, ("", ""))
    return state if state and name == job_name else None


@dataclass(frozen=True)
class JobRecord:
    """What the controller says of one job (`scontrol show job`).

    Attributes:
        state: "RUNNING", "COMPLETING", "PENDING", …
        restarts: How often Slurm has started the job again, or is about to.
        preempted: Whether its place was given to another job.
        seconds_left: Until Slurm kills it: to the time limit, or to the end of the grace.
        over_limit: Whether it ran until its time limit.
        requeue: Whether Slurm may start it again.
        submitted: When it was submitted, or requeued, in seconds of the epoch.
        fields: All fields, by scontrol's names.
    """

    state: str
    restarts: int
    preempted: bool
    seconds_left: float
    over_limit: bool
    requeue: bool
    submitted: float
    fields: Mapping[str, str]

    @property
    def lost_a_node(self) -> bool:
        """Whether it ends because a node of it is gone."""
        return self.state == "NODE_FAIL" or self.fields.get("Reason") == "NodeDown"

    @property
    def cancelled(self) -> bool:
        """Whether it ends because somebody cancelled it: for no other reason that Slurm has."""
        other = self.preempted or self.over_limit or self.lost_a_node
        return self.state in ("COMPLETING", "CANCELLED") and not other


# States of a job that will not run any more, unless it is requeued by hand.
ENDED = frozenset(
    {
        *("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "BOOT_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "DEADLINE", "REVOKED"),
    }
)

# Several "Key=value" on a line: a value may hold spaces, so it ends where the next key begins.
# These have a line of their own, and may hold anything.
_LINES_OF_THEIR_OWN = ("Command=", "WorkDir=", "StdOut=", "StdErr=", "StdIn=", "Comment=")
_FIELD = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=(.*?)(?=\s+[A-Za-z][\w:/]*=|\s*$)")


def job_record(job_id: str) -> JobRecord | None:
    """The controller's record of a job; None where it does not know the job.

    Raises:
        SubmissionError: Slurm does not answer.
    """
    answer = _run("scontrol", "show", "job", job_id)
    if answer.returncode != 0:
        if "Invalid job id" in answer.stderr:
            return None
        raise SubmissionError(f"Slurm says nothing of job {job_id}: {_first_line(answer)}")
    fields: dict[str, str] = {}
    # Of an array it prints all tasks, a block each.
    for line in answer.stdout.partition("\n\n")[0].splitlines():
        if line.lstrip().startswith(_LINES_OF_THEIR_OWN):
            key, _, value = line.lstrip().partition("=")
            fields[key] = value
            continue
        for key, value in _FIELD.findall(line):
            fields.setdefault(key, value)
    start, end = _timestamp(fields.get("StartTime")), _timestamp(fields.get("EndTime"))
    limit_s = _limit_s(fields.get("TimeLimit", ""))
    state = fields.get("JobState", "").split()[0]
    # While a job runs, the end that is written there is the one at its time limit.
    known = None not in (start, end, limit_s) and state != "RUNNING"
    return JobRecord(
        state=state,
        restarts=int(fields.get("Restarts", "0")),
        preempted=_timestamp(fields.get("PreemptTime")) is not None,
        seconds_left=float("inf") if end is None else end - time.time(),
        over_limit=known and end - start >= limit_s,  # type: ignore[operator]
        requeue=fields.get("Requeue") == "1",
        submitted=_timestamp(fields.get("SubmitTime")) or 0.0,
        fields=fields,
    )


def job_output_file(job_id: str) -> str | None:
    """The file that a job's output goes to, or None if Slurm does not say."""
    try:
        record = job_record(job_id)
    except SubmissionError:
        return None
    return record.fields.get("StdOut") if record else None


def kill_wait_s() -> float:
    """Seconds that Slurm waits between telling a job to end and killing it; its default if it
    does not say."""
    found = settings().get("KillWait", "").partition(" ")[0]
    return float(found) if found.isdigit() else 30.0


def settings() -> dict[str, str]:
    """The cluster's settings by slurm.conf's names; none if it does not answer."""
    answer = _run("scontrol", "show", "config")
    lines = (line.partition("=") for line in answer.stdout.splitlines())
    return {name.strip(): value.strip() for name, equals, value in lines if equals}


def partition_settings(name: str) -> dict[str, str]:
    """A partition's settings by slurm.conf's names; none if it does not answer."""
    answer = _run("scontrol", "show", "partition", name, "--oneliner")
    return dict(_FIELD.findall(answer.stdout.partition("\n")[0]))


def qos_settings(name: str) -> dict[str, str]:
    """PreemptMode and GraceTime of a quality of service; none where accounting does not answer."""
    names = ("PreemptMode", "GraceTime")
    answer = _run("sacctmgr", "-nP", "show", "qos", name, f"format={','.join(names)}")
    line = answer.stdout.partition("\n")[0]
    return dict(zip(names, line.split("|"), strict=False)) if line else {}


def accounting_answers() -> bool:
    """Whether there is accounting, so that it can be asked how a job ended."""
    return _run("sacct", "-X", "-n", "-S", "now").returncode == 0


def requeue(job_id: str, exclude: str | None = None) -> None:
    """Have Slurm kill the job and start it again under the same id.

    **This brings back a job that its user has just cancelled**: look at its record first.

    Args:
        job_id: A job that runs; usually this process's own.
        exclude: A node that it should not start on again.

    Raises:
        SubmissionError: Slurm refuses (requeuing is forbidden for the job), or does not answer.
    """
    record = job_record(job_id) if exclude else None
    # The job that is requeued is told to end at once, and may be the one that asks.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STEP_SIGNALS)
    try:
        answer = _run("scontrol", "requeue", job_id)
        if answer.returncode != 0:
            raise SubmissionError(_first_line(answer))
        if record and exclude:
            # Requeued, it is a job that waits, and may be changed. The list is replaced.
            before = record.fields.get("ExcNodeList", "(null)")
            nodes = exclude if before == "(null)" else f"{before},{exclude}"
            _run("scontrol", "update", f"jobid={job_id}", f"ExcNodeList={nodes}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def start_soon(job_id: str) -> None:
    """Let a job of one's own that is requeued start in some seconds, where that is allowed.

    Slurm lets it wait for two minutes by default. Not at once: a node that still knows the job's
    earlier life refuses it, or is drained ("Duplicate jobid").
    """
    _run("scontrol", "update", f"jobid={job_id}", "StartTime=now+3")


def signal_step(job_id: str, number: signal.Signals) -> None:
    """Send a signal to the processes of a job's first step, and not to its batch script.

    Raises:
        SubmissionError: Slurm does not answer, or refuses.
    """
    name = number.name.removeprefix("SIG")
    answer = _run("scancel", f"--signal={name}", f"{job_id}.0")
    if answer.returncode != 0:
        raise SubmissionError(f"scancel --signal={name} {job_id}.0: {_first_line(answer)}")


def write_batch_script(job_id: str, path: str) -> bool:
    """Copy the script that a job was submitted with to `path`; False if Slurm does not give it."""
    return _run("scontrol", "write", "batch_script", job_id, path).returncode == 0


def sbatch(command: list[str], environment: Mapping[str, str]) -> str:
    """Submit by a full command line (`sbatch --parsable …`). Returns the job's id.

    Raises:
        SubmissionError: sbatch refused.
    """
    answer = _run(*command, environment=environment)
    if answer.returncode != 0:
        raise SubmissionError(f"sbatch refused the job: {_first_line(answer)}")
    return answer.stdout.strip().partition(";")[0]


def cancel(job_id: str) -> None:
    """Cancel a job; one that is gone already is no error.

    Raises:
        SubmissionError: Slurm does not answer, or refuses.
    """
    answer = _run("scancel", job_id)
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise SubmissionError(f"scancel {job_id}: {_first_line(answer)}")


@dataclass(frozen=True)
class AccountingRow:
    """One life of a job, as sacct has it (`-D`: a requeued job has several).

    Attributes:
        job_id: As submitted (`12_3` for an array task).
        state: First word of State: "CANCELLED" of "CANCELLED by 0".
        exit_code: Of its steps, else of the batch script.
        signal: That killed one of them, or 0.
        nodes: NodeList.
        ended: End, in ISO form of the cluster's local time, or "Unknown".
        job_name: To tell a job from another that got the same id.
    """

    job_id: str
    state: str
    exit_code: int
    signal: int
    nodes: str
    ended: str
    job_name: str


def accounting(job_ids: Collection[str]) -> list[AccountingRow]:
    """Every life of these jobs, oldest first; none where there is no accounting.

    One call for all of them. Accounting is some seconds behind the controller.
    """
    if not job_ids:
        return []
    # A separator that no job name holds; -D for every life; -X without the steps.
    answer = _run(
        "sacct", "-X", "-D", "-n", "-P", "--delimiter=\x1f", "-j", ",".join(job_ids),
        "-o", "JobID,State,ExitCode,NodeList,End,JobName,DerivedExitCode",
    )  # fmt: skip
    rows = []
    for line in answer.stdout.splitlines():
        job_id, state, code, nodes, ended, name, derived = line.split("\x1f")
        # The job's own code is 11:0 after a segmentation fault as after exit(11); that of its steps
        # tells them apart, 0:11 and 11:0.
        exit_code, _, number = (derived if derived not in ("", "0:0") else code).partition(":")
        state = state.split()[0] if state else ""
        rows.append(
            AccountingRow(job_id, state, int(exit_code), int(number or 0), nodes, ended, name)
        )
    return rows


def _timestamp(text: str | None) -> float | None:
    try:
        # Slurm prints local time.
        return time.mktime(time.strptime(text or "", "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _limit_s(text: str) -> float | None:
    try:
        return 60.0 * minutes(text)
    except ValueError:
        return None


def _run(
    *command: str, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    # Slurm signals every process of a step, and this one may be started as the job is told to
    # end. A blocked signal is inherited as blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STEP_SIGNALS)
    # A user's own formats and filters would change the answers.
    own = ("SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_")
    kept = {name: value for name, value in environment.items() if not name.startswith(own)}
    # Without the limit on bit strings Slurm cuts long lists of array tasks short.
    kept |= {"SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "standard"}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=CLIENT_TIMEOUT_S,
            env=kept,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr=str(error))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _first_line(answer: subprocess.CompletedProcess[str]) -> str:
    lines = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
    return lines[0] if lines else f"exit code {answer.returncode}"
