"""How an attempt ended that did not record it: from Slurm's accounting and from its log."""

import errno
import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from flowjobs.errors import CheckpointWriteError, RankFailedError
from flowjobs.jobs.environment import JobProcess
from flowjobs.jobs.mps import shares_faults
from flowjobs.jobs.origin import identity_of
from flowjobs.runs.files import FILE_SERVER_IS_AWAY
from flowjobs.runs.rank_failures import LOST_CONNECTION, RankFailure, noted_failures
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    EXIT_CANCELLED,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    AttemptRecord,
    JobInfo,
    Outcome,
    State,
    cancelled_outcome,
    now,
    outcome_of,
    utc,
)
from flowjobs.slurm.controller import JobRow
from flowjobs.slurm.jobs import JobAnswer, Known, ask_one
from flowjobs.user_code import text_of, user_place

# Slurm's NodeList of a job that has had no node.
NO_NODES = ("", "None assigned", "(null)")
# The kind of what ended since srun could start nothing.
NOT_LAUNCHED = "launch failed"

# What runs/attempt.py logs as an attempt begins, in the format of entry.py's `log_to_stderr`.
ATTEMPT_LINE = " I attempt "

TAIL_BYTES = 65_536
LAST_LINES = 30

# "exceeded memory limit (1234567890 > 1073741824), being killed", in bytes.
OVER_LIMIT = re.compile(r"exceeded memory limit \((\d+) > (\d+)\)")
OOM_KILL = re.compile(r"oom[-_ ]kill|Out Of Memory", re.IGNORECASE)

# What slurmstepd writes behind CANCELLED AT … when it was not the user.
NOT_BY_THE_USER = re.compile(
    "DUE TO (TIME LIMIT|PREEMPTION|NODE FAILURE|JOB REQUEUE|TASK FAILURE)", re.IGNORECASE
)

# "srun: error: n2: task 1: Killed"; of several nodes at once it gives a list, n[1-2].
FAILED_TASK = re.compile(r"^srun: error: ([\w.-]+): tasks? (\d+): (.+)$", re.MULTILINE)

# What srun says when its step could not be started, and that may pass: Slurm's controller was busy
# or away, or a node refused. "More processors requested than permitted" and such come again.
LAUNCH_FAILED = re.compile(
    r"^srun: error: (?:Task launch for \S+ failed on node (?P<node>[\w.-]+): .*"
    r"|Unable to confirm allocation for job .*|.*\blaunch failed: .*"
    r"|Unable to create step for job \d+: (?:Unable to contact|Socket timed out|Zero Bytes|Message"
    r"|Communication|Connection|Transport|Protocol|Job/step already completing).*)",
    re.MULTILINE,
)

# What a disk or server says that is full, away or hung; others are mistakes, and come again.
FILE_SYSTEM = FILE_SERVER_IS_AWAY | {
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENXIO,
}
# Those that a socket raises too; that of a socket of the user's code names no file.
OF_SOCKETS = frozenset(
    {
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
    }
)
# What gloo, NCCL and the store of a group say on a rank when another one is gone.
OTHERS_ARE_GONE = re.compile(
    r"Connection (was likely )?(closed|reset|refused)|Broken pipe|Timed out (waiting|after)"
    r"|client socket has timed out|wait timeout after|ncclRemoteError|communicator was aborted"
    r"|remote process exit|Watchdog caught collective|Application timeout caused pair closure"
)
# What CUDA's libraries and torch say where a GPU, or the machine, has too little memory.
OUT_OF_GPU_MEMORY = re.compile(
    r"OutOfMemoryError|(CUDA|HIP)\b.*out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
OUT_OF_MEMORY = re.compile(
    r"MemoryError|out of memory|_ALLOC_FAILED|can(no|')t allocate memory", re.I
)
# The port on which the ranks meet is taken; the next start uses another one.
ADDRESS_IN_USE = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
LOST_GPU = re.compile(r"CUDA error|CUDA driver|NCCL|\bECC\b|CUBLAS_STATUS|CUDNN_STATUS|cudaError")
# Not "device-side assertions", which torch names at the end of every error of CUDA.
DEVICE_ASSERT = "device-side assert triggered"
# What CUDA prints, before any exception, in the process alone whose kernel has failed an assert:
# "IndexKernel.cu:93: operator(): block: [0,0,0], thread: [0,0,0] Assertion `…` failed."
OWN_ASSERT = re.compile(r"block: \[\d+,\d+,\d+\], thread: \[\d+,\d+,\d+\] Assertion ")


def cause_of(
    run: Run,
    attempt: AttemptRecord,
    exit_code: int | None = None,
    *,
    answer: JobAnswer | None = None,
    restarted: bool = False,
) -> Outcome:
    """The outcome of an attempt that ended without recording one, as far as it is known.

    Args:
        run: The run.
        attempt: The attempt.
        exit_code: What srun returned, if its batch script is the one that asks.
        answer: What Slurm says of its job, if it has been asked already.
        restarted: Whether Slurm has started its job again.
    """
    job = attempt.job
    if answer is None and job.cluster == "slurm":
        answer = ask_one(identity_of(run, job.job_id, job.log))
    start = answer.row_of_start(job.restart_count) if isinstance(answer, Known) else None
    if job.log:  # where it is now: the study may have been moved
        job = replace(job, log=str(run.log_at(job.log)))
    log = log_tail(job.log)
    # A requeued job appends to the same file.
    log = log[max(0, log.rfind(f"attempt {attempt.number} at ")) :]
    when = f"attempt {attempt.number}{_step(attempt)}"
    ended = utc(start.ended) if start and start.ended else None
    if exit_code is not None:  # a moment ago: its job has not ended yet
        ended = now()
    told = _told_by_slurm(start, log, restarted and exit_code is None)
    if told is None and (failure := first_failure(noted_failures(run, job.start_id), job, log)):
        return replace(failure.outcome, reason=f"{failure.reason}, {when}", ended=ended)
    words, kind, state, code = told or _told_by_exit_code(start, log, exit_code)
    return Outcome(state, code, f"{words} on {job.host}, {when}", _last_words(log), kind, ended)


def first_failure(
    noted: Iterable[RankFailure], job: JobInfo, log: str | None = None
) -> RankFailure | None:
    """The failure that the others of an attempt's ranks follow from; None if it is not known.

    Args:
        noted: What the ranks have noted themselves.
        job: Theirs.
        log: The attempt's part of the job's log; default: the newest attempt's. srun says there
            how a task ended that could note nothing.
    """
    own = [failure for failure in noted if not failure.is_consequence]
    if own:
        # Nodes' clocks may differ; but none that failed since another was gone is among these.
        return min(own, key=lambda failure: failure.time)
    log = _newest_attempt(job) if log is None else log
    for host, rank, ending in FAILED_TASK.findall(log):
        code = _code_of(ending)
        # What became of the first rank is told by Slurm's record of the job, and by its log.
        if rank != "0" and code is not None:
            words, kind, state, code = _told_by_exit_code(None, log, code)
            last_words = _last_words(log_tail(_log_of_rank(job, rank)))
            return RankFailure(int(rank), host, Outcome(state, code, words, last_words, kind))
    return None


def failure_of(error: BaseException, process: JobProcess) -> RankFailure:
    """How this process failed as a rank of its job, that ended with `error`."""
    outcome = outcome_of(error)
    kind = _own_fault_on_gpu(error, process.job) or transient_kind(error) or outcome.kind
    if may_be_anothers(kind):
        reason = f"by MPS, which tells all runs of a fault of one on the GPU: {outcome.reason}"
        outcome = replace(outcome, reason=reason)
    gone = isinstance(error, RuntimeError) and OTHERS_ARE_GONE.search(text_of(error))
    if process.world_size > 1 and (gone or isinstance(error, RankFailedError)):
        kind = LOST_CONNECTION
    return RankFailure(process.rank, process.job.host, replace(outcome, kind=kind))


def may_be_anothers(kind: str) -> bool:
    """Whether a failure of this process may be that of another run, which shares the GPU by MPS."""
    return kind == "lost GPU" and shares_faults()


def _own_fault_on_gpu(error: BaseException, job: JobInfo) -> str | None:
    """The kind of a fault on the GPU, where the process's log says whose it is; else None.

    An index out of range, say, is the model's mistake, and comes back on any GPU. But the library
    that computes next may call it an error of its own (CUBLAS_STATUS_…); and by MPS every client
    is told of it, without whose it is.
    """
    texts = [text_of(of) for of in _causes(error) if isinstance(of, RuntimeError)]
    if not any(LOST_GPU.search(text) for text in texts):
        return None
    if OWN_ASSERT.search(_newest_attempt(job)):
        return "exception"
    asserted = any(DEVICE_ASSERT in text for text in texts)
    return "lost GPU" if asserted and shares_faults() else None


def _code_of(ending: str) -> int | None:
    """The exit code in srun's words for a task's end; None if it was told to end."""
    if found := re.match(r"Exited with exit code (\d+)", ending):
        return int(found[1])
    if ending.startswith("Out Of Memory"):
        return 128 + signal.SIGKILL
    # Those two reach every task of a job that is told to leave: none of them has failed.
    for number in signal.valid_signals() - {signal.SIGTERM, signal.SIGUSR2}:
        if ending.removesuffix(" (core dumped)") == signal.strsignal(number):
            return 128 + number
    return None


def _log_of_rank(job: JobInfo, rank: str) -> str | None:
    """A rank's own log, where submitit gives each one."""
    if job.log and job.log.endswith("_0_log.out"):
        return f"{job.log.removesuffix('_0_log.out')}_{rank}_log.out"
    return None


def _newest_attempt(job: JobInfo) -> str:
    log = log_tail(job.log)
    if job.restart_count == 0 and log.count(ATTEMPT_LINE) == 1:
        return log  # a rank may have died before the first one had begun
    return log[max(0, log.rfind(ATTEMPT_LINE)) :]


def cause_of_no_start(
    job: JobInfo, exit_code: int | None = None, answer: JobAnswer | None = None
) -> Outcome:
    """The outcome of a job that ended before its attempt could begin.

    Args:
        job: The job.
        exit_code: What srun returned, if its batch script is the one that asks.
        answer: What Slurm says of the job, if it has been asked.
    """
    log = log_tail(job.log)
    if isinstance(answer, Known) and answer.newest.state == "CANCELLED":
        reason = f"job {job.job_id} was cancelled before it started"
        return cancelled_outcome(reason)
    # Who asks Slurm is elsewhere, and `job` then names no node: only its batch script is on it.
    node = answer.newest.nodes if isinstance(answer, Known) else "" if answer else job.host
    where = f" on {node}" if node not in NO_NODES else ""
    early = f"job {job.job_id} ended before the run could start{where}"
    if isinstance(answer, Known):
        row = answer.newest
        if row.state == "DEADLINE":  # a new job would be too late as well
            reason = f"{early}: its --deadline has passed"
            return Outcome("failed", EXIT_FAILED, reason, kind="never started")
        if told := _told_by_slurm(row, log, restarted=False):
            words, kind, state, code = told
            return Outcome(state, code, f"{early}: {words}", _last_words(log), kind)
        exit_code = 128 + row.signal if row.signal else row.exit_code
    # While python starts there is no handler yet, and these end it by default.
    if exit_code in (128 + signal.SIGTERM, 128 + signal.SIGUSR2, EXIT_PREEMPTED):
        reason = f"job {job.job_id} was stopped while Python was starting"
        return Outcome("preempted", EXIT_PREEMPTED, reason, kind="preempted")
    if refused := launch_failure(job):
        reason = f"the step of job {job.job_id} was not started: {refused[0]}"
        return Outcome("preempted", EXIT_PREEMPTED, reason, kind=NOT_LAUNCHED)
    reason = f"{early}: {last_error(log)}"
    if where and job.log and not Path(job.log).exists():
        # Slurm makes it before anything else: the node may lack the mount.
        reason += f", so it seems that the node could not write to {Path(job.log).parent}"
    return Outcome("failed", EXIT_FAILED, reason, _last_words(log), "never started")


def launch_failure(job: JobInfo) -> re.Match[str] | None:
    """What srun says of a job whose newest start it could not launch; see LAUNCH_FAILED."""
    said = _last_words(log_tail(job.log))
    found = list(LAUNCH_FAILED.finditer(said, said.rfind(ATTEMPT_LINE) + 1))
    # "Application launch failed" follows the line that says more.
    found = [each for each in found if "Application launch failed" not in each[0]] or found
    # A later start of the job that got further has left an error of ours after it.
    if found and re.search(r"^error: |^Traceback", said[found[-1].end() :], re.MULTILINE):
        return None
    return found[-1] if found else None


def node_that_refused(job: JobInfo) -> str | None:
    """The node that did not launch a job; None if that is not known, or was the controller."""
    refused = launch_failure(job)
    return refused["node"] if refused else None


def failed_node(run: Run, job: JobInfo) -> str:
    """The node whose process died first, as far as is known; else the one of the first rank."""
    if failure := first_failure(noted_failures(run, job.start_id), job):
        return failure.host
    found = FAILED_TASK.search(_newest_attempt(job))
    return found.group(1) if found else job.host


def cancelled_while_requeued(job: JobInfo) -> bool:
    """Whether the user cancelled the job's earlier start just as it asked to be requeued.

    Slurm then starts it again all the same, and accounting says REQUEUED. What is left is what
    slurmstepd wrote to the job's output: every other end has its reason there (DUE TO …).
    """
    # An array task has an id of its own beside the array's.
    job_id = os.environ.get("SLURM_JOB_ID", job.job_id)
    ends = re.findall(rf"\*\*\* JOB {job_id} ON \S+ CANCELLED AT (.*)", log_tail(job.log))
    return bool(job.restart_count and ends and not NOT_BY_THE_USER.search(ends[-1]))


def transient_kind(error: BaseException) -> str | None:
    """The kind of an exception that may pass on another node or at another time, else None.

    What it was raised from counts as well: "the checkpoint cannot be read" may be a stale handle.
    """
    kinds = (_own_transient_kind(of) for of in _causes(error))
    return next((kind for kind in kinds if kind), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _own_transient_kind(error: BaseException) -> str | None:
    # torch's error by its name: this room does not load torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    if isinstance(error, CheckpointWriteError):
        return "file system"
    if isinstance(error, OSError) and error.errno in FILE_SYSTEM:
        may_be_a_socket = error.errno in OF_SOCKETS and not error.filename
        if not (may_be_a_socket and user_place(error, installed=False)):
            return "file system"
    text = text_of(error)
    if isinstance(error, RuntimeError | OSError) and OUT_OF_MEMORY.search(text):
        return "out of memory"
    if isinstance(error, RuntimeError) and ADDRESS_IN_USE.search(text):
        return "address in use"
    # A device-side assert is the model's mistake (an index out of range), on any GPU.
    if isinstance(error, RuntimeError) and LOST_GPU.search(text) and DEVICE_ASSERT not in text:
        return "lost GPU"
    return None


def log_tail(log: str | None) -> str:
    """The end of a log file; empty if there is none."""
    try:
        with Path(log or "").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


# Words, kind, state and exit code of a death.
Told = tuple[str, str, State, int]


def _told_by_slurm(start: JobRow | None, log: str, restarted: bool) -> Told | None:
    """What Slurm itself has done to the job, or knows of its nodes."""
    match start.state if start else "":
        case "NODE_FAIL" | "BOOT_FAIL":
            return "node failure", "node failure", "preempted", EXIT_PREEMPTED
        # REQUEUED also where the job was preempted and had itself requeued before Slurm did.
        case "PREEMPTED" | "REQUEUED":
            return "killed while it was preempted", "preempted", "preempted", EXIT_PREEMPTED
        case "TIMEOUT" | "DEADLINE":
            return "killed at the time limit", "time limit", "preempted", EXIT_PREEMPTED
        case "CANCELLED":
            return "cancelled", "cancelled", "cancelled", EXIT_CANCELLED
        case "OUT_OF_MEMORY":
            return _memory_words(log), "out of memory", "failed", 128 + signal.SIGKILL
    # Accounting is seconds behind the rerun, or is not there; the rerun itself is proof enough.
    if restarted and start is None:
        return "lost, and started again by Slurm", "preempted", "preempted", EXIT_PREEMPTED
    return None


def _told_by_exit_code(start: JobRow | None, log: str, exit_code: int | None) -> Told:
    """What the exit code of a process, or else of its job, stands for."""
    code = exit_code
    if code is None and start is not None:
        code = 128 + start.signal if start.signal else start.exit_code
    # Before the code: without cgroups Slurm shows such a kill as FAILED by signal 9.
    if OVER_LIMIT.search(log) or OOM_KILL.search(log):
        return _memory_words(log), "out of memory", "failed", 128 + signal.SIGKILL
    if code is None:
        words = "died silently (as after SIGKILL or os._exit)"
        return words, "killed", "failed", EXIT_FAILED
    if number := _signal_of(code):
        return _explain_signal(number)
    if code == EXIT_PREEMPTED:
        return "left in time", "preempted", "preempted", EXIT_PREEMPTED
    return f"ended with exit code {code}", "exception", "failed", code or EXIT_FAILED


def _signal_of(exit_code: int) -> int:
    """The signal that an exit code stands for, by the shell's count (128 + n) or Python's (-n).

    0 for a code of the program's own: up to 128 all are, and above where there is no such signal.
    """
    number = exit_code - 128 if exit_code > 128 else -exit_code
    return number if number in signal.valid_signals() else 0


def _explain_signal(number: int) -> Told:
    match number:
        case signal.SIGSEGV:
            return "segmentation fault", "segmentation fault", "failed", 128 + signal.SIGSEGV
        case signal.SIGABRT:
            return "aborted (SIGABRT)", "aborted", "failed", 128 + signal.SIGABRT
        case signal.SIGBUS:
            return "bus error", "bus error", "failed", 128 + signal.SIGBUS
        case signal.SIGTERM | signal.SIGUSR2:
            # Told to leave before it could listen.
            return "told to leave while it started", "preempted", "preempted", EXIT_PREEMPTED
        case signal.SIGKILL:
            return "killed (SIGKILL)", "killed", "failed", 128 + signal.SIGKILL
    return f"ended by {_name(number)}", "signal", "failed", 128 + number


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of the real-time signals only the first and the last have names
        return f"signal {number}"


def _memory_words(log: str) -> str:
    found: Sequence[str] = ()
    if matches := OVER_LIMIT.findall(log):
        found = matches[-1]
    if not found:
        return "out of memory"
    used, limit = (int(number) / 2**30 for number in found)
    # sweeps/retry.py has the limit from these words: change both.
    return f"out of memory: {used:.3g} of {limit:.3g} GiB"


def _step(attempt: AttemptRecord) -> str:
    return "" if attempt.last_step is None else f", step {attempt.last_step:,}"


def last_error(log: str) -> str:
    """What the last traceback of the log says, else its last line."""
    lines = [line for line in _last_words(log).splitlines() if line.strip()]
    raised = [line for line in lines if not line.startswith((" ", "Traceback"))]
    if lines and lines[0].startswith("Traceback") and raised:
        return raised[0]
    return lines[-1].strip() if lines else "it has no log"


def _last_words(log: str) -> str:
    """The last traceback of the log, or its last lines."""
    at = log.rfind("Traceback (most recent call last)")
    lines = (log[at:] if at >= 0 else log).splitlines()
    return "\n".join(lines[-LAST_LINES:])
