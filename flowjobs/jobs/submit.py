"""Hands a run to submitit: as a Slurm job, as a job on this machine, or into the debugger."""

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from submitit.core.core import Job
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.debug import DebugJob

from flowjobs.config import KeyValues, SlurmConfig
from flowjobs.errors import SubmissionError
from flowjobs.jobs import by_hand, slurm
from flowjobs.jobs.executors import Cluster, make_executor
from flowjobs.jobs.holders import judge_for
from flowjobs.jobs.origin import Origin, origin_of
from flowjobs.jobs.sbatch_environment import environment_for_sbatch
from flowjobs.jobs.task import RunTask, log_to_stderr
from flowjobs.runs.lock import Verdict, lock_holder
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo


@dataclass(frozen=True)
class SubmittedJob:
    """A job that was handed over.

    Attributes:
        job_id: The scheduler's id; without one, the id of the controlling process.
        cluster: Where it went.
        log: The file that its output goes to.
        job: submitit's handle, for a job on this machine.
    """

    job_id: str
    cluster: Cluster
    log: Path
    job: Job[None]

    def alive(self, run: Run) -> bool:
        """Whether the job still waits or runs."""
        if self.cluster == "slurm":
            return slurm.queued_state(self.job_id, run.name) is not None
        return not self.job.done()


def submit(
    run: Run,
    cluster: Cluster,
    *,
    continues: str | None = None,
    exclude: str | None = None,
    origin: Origin | None = None,
    task: Callable[[], None] | None = None,
) -> SubmittedJob:
    """Submit the run's job.

    Args:
        run: The run; its config is on disk.
        cluster: Where to; "debug" also runs it, in this process, and stops in the debugger on an
            exception.
        continues: The job that this one goes on from, without a person having asked for it.
        exclude: A node to leave out beside those of the config.
        origin: From where and how; default: as this process is, with the config's options.
        task: What the job does; default: train the run.

    Raises:
        SubmissionError: sbatch refused; the text has its words and what could be meant.
    """
    origin = origin or Origin.here(run.config().slurm)
    asked = origin.options or run.config().slurm
    if exclude:
        nodes = f"{asked.exclude},{exclude}" if asked.exclude else exclude
        asked = dataclasses.replace(asked, exclude=nodes)
    if continues:
        asked = dataclasses.replace(
            asked, sbatch=KeyValues({"chdir": origin.folder, **asked.sbatch})
        )
    with _noted_in_any_case(cluster):
        with _environment_of(cluster, origin, asked, continues):
            executor = make_executor(cluster, run, asked, origin.python)
            try:
                job: Job[None] = executor.submit(task or RunTask(str(run.folder)))
            except (FailedJobError, FailedSubmissionError) as error:
                for pattern in (".submission_file_*.sh", "[0-9a-f]" * 32 + ".pkl"):
                    for leftover in run.logs.glob(pattern):
                        leftover.unlink()
                raise SubmissionError(_explain(str(error), asked)) from error
        submitted = SubmittedJob(job.job_id, cluster, Path(job.paths.stdout), job)
        if cluster == "slurm":
            origin.note(run, job.job_id)
        run.add_submission(submitted.job_id, cluster, submitted.log, continues=continues)
    if isinstance(job, DebugJob):
        log_to_stderr()
        job.results()
    return submitted


def resubmit(run: Run, job: JobInfo, exclude: str | None = None) -> str:
    """Submit a run again, the way its job was submitted, to go on from that one.

    Args:
        run: The run.
        job: The job that ends.
        exclude: A node to leave out.

    Returns:
        The new job's id.

    Raises:
        SubmissionError: It cannot be submitted.
    """
    if job.cluster == "local":
        return submit(run, "local", continues=job.job_id).job_id
    entries = [entry for entry in run.submissions() if entry["job_id"] == job.job_id]
    if entries and "again" in entries[-1]:
        return by_hand.resubmit(run, entries[-1], exclude)
    origin = origin_of(run, job.job_id)
    return submit(run, "slurm", continues=job.job_id, exclude=exclude, origin=origin).job_id


def running_job(run: Run) -> str | None:
    """The job of the run that waits or runs, in words for a person; None if there is none.

    Raises:
        SubmissionError: There was a Slurm job, and Slurm does not say what became of it.
    """
    submissions = run.submissions()
    if submissions and submissions[-1]["cluster"] == "slurm":
        job_id = submissions[-1]["job_id"]
        state = slurm.queued_state(job_id, run.name)
        if state == "COMPLETING" and not _comes_back(run, job_id):
            return None  # its process may still save; the next one waits for it
        if state:
            return f"job {job_id} ({state.lower()})"

    def judge(holder: JobInfo, lock_is_free: bool | None) -> Verdict:
        verdict = judge_for(JobInfo.in_foreground())(holder, lock_is_free)
        return "gone" if verdict == "leaving" else verdict  # as above

    return lock_holder(run.folder, judge)


def _comes_back(run: Run, job_id: str) -> bool:
    """Whether Slurm will start a job that ends again."""
    record = slurm.job_record(job_id)
    status = run.status()
    attempts = status.attempts if status else []
    lives = [known.job.restart for known in attempts if known.job.job_id == job_id]
    return record is not None and record.restarts > max(lives, default=0)


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Keep Ctrl-C waiting while the block lasts: a job that nobody noted could not be cancelled.

    Not by a mask: the signal may reach another thread, and Python handles it in the main one.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before in (signal.SIG_IGN, None):
        yield
        return
    came = threading.Event()
    signal.signal(signal.SIGINT, lambda number, frame: came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came.is_set():
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _noted_in_any_case(cluster: Cluster) -> Iterator[None]:
    # sbatch gets Ctrl-C at a terminal too, and inherits the mask; so would a job on this machine.
    shielded = {signal.SIGINT} if cluster == "slurm" else set()
    with ctrl_c_waits():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, shielded)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment_of(
    cluster: Cluster, origin: Origin, asked: SlurmConfig, continues: str | None
) -> Iterator[None]:
    """What a job inherits, while the block lasts."""
    saved = dict(os.environ)
    inherited = {**origin.environment}
    inherited.pop(slurm.CONTINUES, None)
    if continues:
        inherited[slurm.CONTINUES] = continues
    if token := saved.get("SLURM_JWT"):
        inherited["SLURM_JWT"] = token
    _replace_environment(inherited)
    try:
        match cluster:
            case "slurm":
                _replace_environment(environment_for_sbatch(inherited, asked))
                # submitit prints what sbatch said, and raises it as well.
                with contextlib.redirect_stderr(io.StringIO()):
                    yield
            case "local":
                with _detached_children():
                    yield
            case "debug":
                yield
    finally:
        _replace_environment(saved)


def _replace_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


@contextlib.contextmanager
def _detached_children() -> Iterator[None]:
    """Make child processes started in the block independent of this one's terminal.

    submitit starts a local job as a plain child: Ctrl-C and the terminal's end would kill it, and
    a pipe that this process writes to (`| tee`) would stay open as long as the job lives.
    """
    handlers = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)
    }
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    nowhere = os.open(os.devnull, os.O_RDWR)
    while nowhere <= 2:  # a process may be started with its standard streams closed
        nowhere = os.dup(nowhere)
    kept = [os.dup(descriptor) for descriptor in range(3)]
    try:
        for descriptor in range(3):
            os.dup2(nowhere, descriptor)
        yield
    finally:
        for descriptor in range(3):
            os.dup2(kept[descriptor], descriptor)
        for opened in (*kept, nowhere):
            os.close(opened)
        for ignored, handler in handlers.items():
            signal.signal(ignored, handler)


def _explain(said: str, asked: SlurmConfig) -> str:
    lines = [line.strip() for line in said.splitlines() if "error" in line.lower()] or [said]
    text = f"sbatch refused the job: {'; '.join(lines)}"
    if "invalid partition" in said.lower():
        text += f"; --partition {asked.partition} is not one of {', '.join(slurm.partitions())}"
    return text
