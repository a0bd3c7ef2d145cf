"""Submit a run with submitit: as a Slurm job, as a job on this machine, or in the debugger."""

import contextlib
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.core import Job
from submitit.local.debug import DebugJob

from flowjobs.config import SlurmConfig
from flowjobs.errors import FlowjobsError, SubmissionError, SubmissionUnknownError
from flowjobs.field_values import KeyValues
from flowjobs.jobs.array import Array
from flowjobs.jobs.deferred_signals import signals_deferred_until_noted
from flowjobs.jobs.executors import (
    Cluster,
    SlurmExecutorAnywhere,
    array_executor,
    check_study,
    here_executor,
    slurm_executor,
)
from flowjobs.jobs.origin import Origin, identity_of
from flowjobs.runs.process import process_mark
from flowjobs.runs.submittable import BATCH_FILE, Submittable
from flowjobs.slurm.jobs import Gone, Known, Unknown, ask_one
from flowjobs.slurm.options import CONTINUES, environment_for_sbatch
from flowjobs.slurm.submission import cancelled_unless_noted
from flowjobs.slurm.waiting import why_it_waits


@dataclass(frozen=True)
class SubmittedJob:
    """A job that was submitted.

    Attributes:
        job_id: The scheduler's id; without one, the id of the controlling process.
        cluster: Where it went.
        log: The file that its output goes to.
        job: submitit's handle, for a job on this machine.
    """

    job_id: str
    cluster: Cluster
    log: Path
    job: Job[None] | None = None

    def alive(self, run: Submittable) -> bool:
        """Whether the job still waits or runs.

        Raises:
            SubmissionError: That is unknown.
        """
        if self.job:
            return not self.job.done()
        match ask_one(identity_of(run, self.job_id)):
            case Known() as known:
                return not known.over
            case Gone():
                return False
            case Unknown(why):
                raise SubmissionError(why)

    def waits(self, run: Submittable) -> str:
        """Why the job waits; empty if it does not, or if Slurm does not say."""
        answer = ask_one(identity_of(run, self.job_id)) if self.cluster == "slurm" else None
        if isinstance(answer, Known) and answer.newest.waits:
            return why_it_waits(answer.newest).why
        return ""


def submit(
    run: Submittable,
    cluster: Cluster,
    task: Callable[[], None],
    *,
    continues: str | None = None,
    exclude: str | None = None,
    origin: Origin | None = None,
) -> SubmittedJob:
    """Submit a job of a run, or of several at once.

    Args:
        run: The run, or a pack; its config is on disk.
        cluster: Where to; "debug" also runs it, in this process, and stops in the debugger on an
            exception.
        task: What the job does; it is pickled.
        continues: The job that this one continues; flowjobs itself submits it, not its user.
        exclude: A node to leave out beside those of the config.
        origin: From where and how; default: as this process is, with the config's options.

    Raises:
        SubmissionError: sbatch refused; the text has its words and what could be meant.
    """
    check_study(run.study)
    origin = origin or Origin.here(run.asked())
    asked = origin.options or run.asked()
    if exclude:
        nodes = f"{asked.exclude},{exclude}" if asked.exclude else exclude
        asked = dataclasses.replace(asked, exclude=nodes)
    # A restart begins where the first submission did, not where whoever restarts it stands.
    if continues:
        asked = dataclasses.replace(
            asked, sbatch=KeyValues({"chdir": origin.folder, **asked.sbatch})
        )
    with signals_deferred_until_noted(cluster):
        if cluster == "slurm":
            submitted = _to_slurm(run, task, origin, asked, continues)
        else:
            submitted = _to_this_machine(run, cluster, task, origin, asked, continues)
        with contextlib.suppress(OSError):  # it is noted; the next submission tidies up
            run.batch_file.replace(run.logs / f"{submitted.job_id}_{BATCH_FILE}")
    # submitit's debug job runs only as it is asked for results: up there, Ctrl-C would wait for it.
    if isinstance(submitted.job, DebugJob):
        submitted.job.results()
    return submitted


def _to_slurm(
    run: Submittable,
    task: Callable[[], None],
    origin: Origin,
    asked: SlurmConfig,
    continues: str | None,
) -> SubmittedJob:
    executor: SlurmExecutorAnywhere | None = None
    with cancelled_unless_noted(lambda: executor.accepted if executor else None):
        with _environment_of("slurm", origin, asked, continues):
            executor = slurm_executor(run, asked, origin.python)
            try:
                job = executor.call_sbatch(task)
            except SubmissionUnknownError:
                raise  # it may come yet: it is looked for as long as its batch file is there
            except SubmissionError:
                run.batch_file.unlink(missing_ok=True)
                raise
        log = run.output_of(job.job_id)
        # Before the job is listed: whoever finds it there may restart it from this.
        origin.note(run, job.job_id)
        identity = job.identity(run.name)
        run.add_submission(job.job_id, "slurm", log, continues=continues, identity=identity)
    return SubmittedJob(job.job_id, "slurm", log)


def _to_this_machine(
    run: Submittable,
    cluster: Cluster,
    task: Callable[[], None],
    origin: Origin,
    asked: SlurmConfig,
    continues: str | None,
) -> SubmittedJob:
    with _environment_of(cluster, origin, asked, continues):
        executor = here_executor(cluster, run, asked)
        job = executor.submit(task)
    log = Path(job.paths.stdout)
    identity = {"process": process_mark(int(job.job_id))} if cluster == "local" else None
    run.add_submission(job.job_id, cluster, log, continues=continues, identity=identity)
    return SubmittedJob(job.job_id, cluster, log, job)


def submit_array(
    array: Array,
    submitted: Sequence[Submittable],
    name: str,
    task: Callable[[], None],
    asked: SlurmConfig,
    parallel: int | None,
) -> str:
    """Submit many runs as one array; see `jobs.array` for what is on disk at each moment.

    Args:
        array: The array; nothing of it is on disk yet.
        submitted: Runs or packs, whose configs are on disk; in the order of the tasks.
        name: The job's.
        task: What each task does; it is pickled.
        asked: Options of the cluster, the same for all.
        parallel: How many run at a time; None: as many as can.

    Returns:
        The job's id.

    Raises:
        SubmissionError: sbatch refused; nothing is left of the array.
        SubmissionUnknownError: Whether it has taken the job is unknown, or it has and not all runs
            could note it: `submitting` finds it out.
    """
    origin = Origin.here(asked)
    with signals_deferred_until_noted("slurm"), _environment_of("slurm", origin, asked, None):
        executor = array_executor(array, name, asked, origin.python)
        tasks = len(submitted)
        executor.parameters |= {"map_count": tasks, "array_parallelism": parallel or tasks}
        try:
            # Before sbatch: the first task may start before that has returned.
            array.write(submitted, name, origin)
        except BaseException:
            array.remove()
            raise
        try:
            job = executor.call_sbatch(task, array.mark)
        # Its tasks may start yet, and find their runs by what was written.
        except SubmissionUnknownError:
            raise
        except SubmissionError:
            array.remove()
            raise
        try:
            array.note(job)
        # Not cancelled: its tasks note themselves.
        except (FlowjobsError, OSError) as error:
            raise SubmissionUnknownError(
                f"job {job.job_id} was submitted, and not all of its runs could note it ({error}): "
                "mend that, and the same command completes it"
            ) from error
    return job.job_id


@contextlib.contextmanager
def _environment_of(
    cluster: Cluster, origin: Origin, asked: SlurmConfig, continues: str | None
) -> Iterator[None]:
    """What a job inherits, while the block lasts."""
    saved = dict(os.environ)
    inherited = origin.environment_here()
    # With another signal than USR2 submitit would end a run in the middle of a step.
    for name in (CONTINUES, "SUBMITIT_PREEMPT_SIGNAL"):
        inherited.pop(name, None)
    if continues:
        inherited[CONTINUES] = continues
    _replace_environment(inherited)
    try:
        match cluster:
            case "slurm":
                _replace_environment(environment_for_sbatch(inherited, asked))
                # A restart gets the umask and limits of the submission, which has its own already.
                inherits = origin.umask_and_limits() if continues else contextlib.nullcontext()
                # submitit prints what sbatch said, and raises it as well.
                with inherits, contextlib.redirect_stderr(io.StringIO()):
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
    # What is ignored stays so in a child; a handler would not.
    handlers = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)
    }
    # What waits in a buffer would come out in the block, and go nowhere.
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
