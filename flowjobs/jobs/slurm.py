"""Asking Slurm, and asking it for things. Robust forms only: see each function for the traps."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    # The words before the name tell it from a line of a banner.
    answer = _run("sinfo", "--noheader", "--format=partition %R")
    lines = [line.split() for line in answer.stdout.splitlines()]
    return sorted({words[1] for words in lines if words[:1] == ["partition"] and words[1:]})


# What sbatch prints with --parsable, with the cluster if one was asked for; and what it prints
# without, where a wrapper drops that option.
_SAID_ID = re.compile(r"(\d+)(?:;([\w.-]+))?")
_SUBMITTED = re.compile(r"Submitted batch job (\d+)(?: on cluster [\w.-]+)?")

# How far the clocks of two machines may differ.
CLOCKS_S = 300.0

# Written into the comment of every job that we submit, and told by all of Slurm's commands.
MARK = re.compile(r"flowjobs:([0-9a-f]{12})")

# Names and comments hold anything but this.
SEPARATOR = "\x1f"


@dataclass(frozen=True)
class JobRow:
    """One line on a job: as the controller has it, or one life of it in accounting.

    Attributes:
        job_id: As submitted (`12_3` for an array task; of tasks that wait still together,
            accounting has `12_[3-5]` or `12`).
        state: First word of it: "CANCELLED" of "CANCELLED by 0".
        uid: Its user's.
        cluster: Slurm's name of the cluster.
        name: The job's.
        submitted: When it was submitted or requeued, in seconds of the epoch.
        ended: When it ended, if it has; of a job that runs the controller says when it would.
        exit_code: Of the batch script; accounting has that of its steps.
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


def queue(uids: Collection[int]) -> list[JobRow]:
    """The jobs of these users that the controller knows: all that wait or run, and for some
    minutes (MinJobAge) those that have ended. Of other users only where jobs are not private.

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
    answer = _run(
        *("squeue", "-h", "-a", "-r", "-t", "all", "-u", ",".join(map(str, sorted(uids)))),
        *("-O", ",".join(f"{field}:{SEPARATOR}" for field in fields)),
    )
    if answer.returncode != 0:
        raise SubmissionError(f"Slurm does not say which jobs there are: {_first_line(answer)}")
    rows = []
    for cells in _cells(answer.stdout, len(fields)):
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
                submitted=_timestamp(submitted) or 0.0,
                ended=_timestamp(ended),
                exit_code=0 if status & 0x7F else status >> 8,
                signal=status & 0x7F,
                nodes=nodes,
                restarts=int(restarts) if restarts.isdigit() else 0,
                log=log,
                marks=frozenset(MARK.findall(comment)),
                reason=reason,
                starts=_timestamp(starts),
                dependency="" if dependency == "(null)" else dependency,
            )
        )
    return rows


def _cells(printed: str, count: int) -> list[list[str]]:
    """The fields of each line that has so many: not of a banner, nor of what follows a newline
    in the last field."""
    lines = (line.split(SEPARATOR, count - 1) for line in printed.splitlines())
    return [[cell.strip() for cell in cells] for cells in lines if len(cells) == count]


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
    if answer.returncode != 0 and "Invalid job id" in answer.stderr:
        return None
    _, found, record = answer.stdout.partition("JobId=")  # after a banner, if there is one
    if answer.returncode != 0 or "JobState=" not in record:
        raise SubmissionError(f"Slurm says nothing of job {job_id}: {_first_line(answer)}")
    fields: dict[str, str] = {}
    # Of an array it prints all tasks, a block each.
    for line in (found + record).partition("\n\n")[0].splitlines():
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


def kill_wait_s() -> float:
    """Seconds that Slurm waits between telling a job to end and killing it; its default if it
    does not say."""
    found = settings().get("KillWait", "").partition(" ")[0]
    return float(found) if found.isdigit() else 30.0


def cluster_name() -> str:
    """Slurm's name of the cluster that answers here; empty if none does."""
    return settings().get("ClusterName", "")


def settings() -> dict[str, str]:
    """The cluster's settings by slurm.conf's names; none if it does not answer."""
    answer = _run("scontrol", "show", "config")
    lines = (line.partition("=") for line in answer.stdout.splitlines())
    return {name.strip(): value.strip() for name, equals, value in lines if equals}


def partition_settings(name: str) -> dict[str, str]:
    """A partition's settings by slurm.conf's names; none if it does not answer."""
    answer = _run("scontrol", "show", "partition", name, "--oneliner")
    _, found, settings = answer.stdout.partition("PartitionName=")
    return dict(_FIELD.findall((found + settings).partition("\n")[0]))


def qos_settings(name: str) -> dict[str, str]:
    """PreemptMode and GraceTime of a quality of service; none where accounting does not answer."""
    names = ("PreemptMode", "GraceTime")
    answer = _run("sacctmgr", "-nP", "show", "qos", name, f"format={','.join(names)}")
    lines = [line.split("|") for line in answer.stdout.splitlines()]
    return next((dict(zip(names, line, strict=True)) for line in lines if len(line) == 2), {})


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


@dataclass(frozen=True)
class HandedOver:
    """A job that sbatch has taken.

    Attributes:
        job_id: Its id; of an array, the array's.
        cluster: Slurm's name of the cluster that it went to; empty if that does not answer.
        mark: Ours, in its comment.
    """

    job_id: str
    cluster: str
    mark: str

    def identity(self, job_name: str) -> dict[str, str | float]:
        """What the run notes of it, beside its id."""
        return {
            "job_name": job_name,
            "slurm_cluster": self.cluster,
            "mark": self.mark,
            "handed_over": time.time(),
        }


@contextlib.contextmanager
def cancelled_unless_noted(handed_over: Callable[[], HandedOver | None]) -> Iterator[None]:
    """Cancel a job that was handed over in the block if the block then fails: nobody knows it.

    Raises:
        SubmissionError: The block failed so; the text says what became of the job.
    """
    try:
        yield
    except BaseException as error:
        job = handed_over()
        if job is None:
            raise
        try:
            cancel(job.job_id)
            became = "it is cancelled"
        except SubmissionError as refused:
            became = f"it could not be cancelled either ({refused}): scancel {job.job_id}"
        raise SubmissionError(
            f"job {job.job_id} was submitted, but could not be noted ({error}): {became}"
        ) from error


def sbatch(command: Sequence[str], environment: Mapping[str, str]) -> HandedOver:
    """Submit by a command line (`sbatch OPTIONS SCRIPT ARGUMENTS`), with a mark in the comment.

    What `sbatch` prints is not believed where it is more than an id: sites wrap it, and print
    lines of their own. The mark finds the job then, also where sbatch failed after it had handed
    the job over.

    Raises:
        SubmissionError: sbatch refused the job; or what became of it is unknown, then the text says
            how to find it.
    """
    mark = secrets.token_hex(6)
    program, *rest = command
    comments = [word for word in rest if word.startswith("--comment=")]
    comment = comments[-1].partition("=")[2] if comments else environment.get("SBATCH_COMMENT", "")
    marked = " ".join([*comment.split(), f"flowjobs:{mark}"])
    # On the command line: there accounting keeps it too (SubmitLine), and it wins over the script.
    rest = [word for word in rest if word not in comments]
    asked_at = time.time()
    answer = _run(*(program, "--parsable", f"--comment={marked}", *rest), environment=environment)
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode == 0 and len(lines) == 1 and (found := _SAID_ID.fullmatch(lines[0])):
        return HandedOver(found[1], found[2] or cluster_name(), mark)
    said = {found[1]: found[2] or "" for line in lines if (found := _SAID_ID.fullmatch(line))}
    said |= {found[1]: "" for line in lines if (found := _SUBMITTED.fullmatch(line))}
    try:
        rows = [row for row in queue({os.getuid()}) if row.submitted >= asked_at - CLOCKS_S]
    except SubmissionError as error:
        raise SubmissionError(
            f"{_refusal(answer)}; whether the job was taken is unknown ({error}): one with the "
            f"comment flowjobs:{mark} would be it (squeue --me -o '%i %k')"
        ) from None
    # Where the site drops comments, an id that sbatch has said is one if it is that of a new job.
    ours = [row for row in rows if mark in row.marks] or [
        row for row in rows if not row.marks and row.job_id.partition("_")[0] in said
    ]
    # A job that was refused stays with the controller for minutes, as one that failed on no node.
    ours = [row for row in ours if row.nodes or row.state not in ENDED]
    if ours:
        return HandedOver(ours[0].job_id.partition("_")[0], ours[0].cluster, mark)
    elsewhere = [(job_id, cluster) for job_id, cluster in said.items() if cluster]
    if answer.returncode == 0 and elsewhere:
        return HandedOver(*elsewhere[0], mark)
    raise SubmissionError(_refusal(answer))


def _refusal(answer: subprocess.CompletedProcess[str]) -> str:
    if answer.returncode == 0:
        return f"sbatch printed no job id, and no new job is in the queue: {_first_line(answer)}"
    lines = [line.strip() for line in answer.stderr.splitlines() if "error" in line.lower()]
    return f"sbatch refused the job: {'; '.join(lines) or _first_line(answer)}"


def cancel(job_id: str) -> None:
    """Cancel a job; one that is gone already is no error. Look first whether it is the one meant.

    Raises:
        SubmissionError: Slurm does not answer, or refuses.
    """
    answer = _run("scancel", job_id)
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise SubmissionError(f"scancel {job_id}: {_first_line(answer)}")


def accounting(job_ids: Collection[str]) -> list[JobRow] | None:
    """Every life of all jobs that have or had these ids on this cluster, oldest first.

    One call for all of them. Accounting is some seconds behind the controller.

    Returns:
        None where the cluster has no accounting.

    Raises:
        SubmissionError: Accounting does not answer.
    """
    if not job_ids:
        return []
    fields: tuple[str, ...] = (
        *("JobID", "State", "UID", "Cluster", "Submit", "End", "ExitCode", "NodeList"),
        *("DerivedExitCode", "JobName", "Comment", "SubmitLine"),
    )
    answer = _ask_accounting(job_ids, fields)
    if answer.returncode != 0 and "Invalid field" in answer.stderr:
        fields = fields[:-1]  # before Slurm 21.08
        answer = _ask_accounting(job_ids, fields)
    if answer.returncode != 0:
        if "accounting storage is disabled" in answer.stderr:
            return None
        raise SubmissionError(f"accounting does not answer: {_first_line(answer)}")
    rows = []
    for cells in _cells(answer.stdout, len(fields)):
        job_id, state, uid, cluster, submitted, ended, code, nodes, derived, name, *told = cells
        # The job's own code is 11:0 after a segmentation fault as after exit(11); that of its steps
        # tells them apart, 0:11 and 11:0.
        exit_code, _, number = (derived if derived not in ("", "0:0") else code).partition(":")
        rows.append(
            JobRow(
                job_id=job_id,
                state=(state.split() or [""])[0],
                uid=int(uid) if uid.isdigit() else -1,
                cluster=cluster,
                name=name,
                submitted=_timestamp(submitted) or 0.0,
                ended=_timestamp(ended),
                exit_code=int(exit_code) if exit_code.isdigit() else 0,
                signal=int(number) if number.isdigit() else 0,
                nodes=nodes,
                marks=frozenset(MARK.findall(" ".join(told))),
            )
        )
    return rows


def _ask_accounting(
    job_ids: Collection[str], fields: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    # -D for every life, and for older jobs of the same id; -X without the steps.
    return _run(
        *("sacct", "-X", "-D", "-n", "-P", f"--delimiter={SEPARATOR}"),
        *("-j", ",".join(sorted(job_ids)), "-o", ",".join(fields)),
    )


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
        # Whatever bytes a job's name or a site's banner holds.
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
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
    errors = [line for line in lines if "error" in line.lower()]  # others may be a banner's
    return (errors or lines or [f"exit code {answer.returncode}"])[0]
