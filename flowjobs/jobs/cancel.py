"""Cancel runs: note it on disk, then end their jobs."""

import contextlib
import os
import signal
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from flowjobs.errors import ConfigError, FlowjobsError, SubmissionError
from flowjobs.jobs.current_job import jobs_of
from flowjobs.jobs.origin import noted_identity
from flowjobs.runs.files import FILES_AT_ONCE
from flowjobs.runs.lock import lock_holder
from flowjobs.runs.pack import Pack, may_remain, pack_of
from flowjobs.runs.process import ignores, process_lives
from flowjobs.runs.run import Run, run_names
from flowjobs.runs.status import CANCELLED, same_host
from flowjobs.slurm.controller import cancel as scancel
from flowjobs.slurm.jobs import JobAnswer, JobIdentity, Known, Unknown, ask
from flowjobs.tracking.process import close_session

# W&B is told by a process for each run, which takes a second of CPU.
TOLD_AT_ONCE = 4


def cancel(run: Run) -> str:
    """Cancel a run and every job of it. Returns what was done.

    Raises:
        SubmissionError: A job of it may live on, or the run could not be noted as cancelled; the
            text says which. A job that starts sees that its run is noted, and ends.
    """
    ((_, said),) = cancel_together([run])
    if isinstance(said, SubmissionError):
        raise said
    return said


@dataclass
class _Cancelling:
    """A run that is being cancelled.

    Attributes:
        run: The run.
        before: Whether it was cancelled already.
        unnoted: Why it could not be noted as cancelled; its jobs are ended all the same.
        jobs: Its Slurm jobs, the newest last.
        newest: Its newest job, if that is of Slurm: of older ones it does not matter whether they
            are known, since it was submitted when they were gone.
        alive: Those of them that wait or run, and may be ended.
        ended: What was ended, as text.
        error: Why a job of it may live on.
    """

    run: Run
    before: bool = False
    unnoted: OSError | None = None
    jobs: list[JobIdentity] = field(default_factory=list)
    newest: JobIdentity | None = None
    alive: list[JobIdentity] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    error: SubmissionError | None = None


def cancel_together(runs: Sequence[Run]) -> Iterator[tuple[Run, str | SubmissionError]]:
    """Cancel runs and every job of them; Slurm is asked once and told once.

    Yields:
        Each run with what was done, or why that could not be.
    """
    # First: a job that is just being requeued must see it.
    wanted = [run for run in runs if not _is_finished(run)]
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        cancelling = dict(zip(wanted, threads.map(_request_cancel, wanted), strict=True))
    _end_slurm_jobs([*cancelling.values()])
    with ThreadPoolExecutor(TOLD_AT_ONCE) as threads:
        told = {run: threads.submit(_end_and_note, each) for run, each in cancelling.items()}
        for run in runs:
            if run not in told:
                yield run, f"{run.name} is finished; there is nothing to cancel"
                continue
            try:
                yield run, told[run].result()
            except SubmissionError as error:
                yield run, error


def _is_finished(run: Run) -> bool:
    try:
        return run.finished()
    except (FlowjobsError, OSError):
        return False  # unknown: a job of it may be there


def _request_cancel(run: Run) -> _Cancelling:
    """Note a run as cancelled."""
    before = False
    with contextlib.suppress(OSError):
        before = run.cancel_requested()
    try:
        run.request_cancel()
    except OSError as error:
        return _Cancelling(run, unnoted=error)
    return _Cancelling(run, before)


def _end_and_note(cancelling: _Cancelling) -> str:
    run, unnoted = cancelling.run, cancelling.unnoted
    noted = "it is noted as cancelled: a job of it that starts sees that, and ends"
    if unnoted:
        noted = f"it could not be noted as cancelled ({unnoted}): a requeue would bring it back"
    try:
        if cancelling.error:
            raise cancelling.error
        ended = cancelling.ended + _end_process(run)
        if not unnoted:  # else the disk refuses this as well
            _note_end(run)
    except (FlowjobsError, OSError) as error:
        raise SubmissionError(f"{run.name}: {error}; {noted}") from error
    if unnoted:
        done = f"cancelled {', '.join(ended)}" if ended else "no job of it was cancelled"
        raise SubmissionError(f"{run.name}: {done}; {noted}; mend that, and cancel it again")
    if ended:
        return f"{run.name}: cancelled {', '.join(ended)}; submit it again to resume"
    if cancelling.before:
        return f"{run.name} is already cancelled; no job of it waits or runs"
    return f"{run.name}: no job of it waits or runs; nothing will start it again"


def _note_end(run: Run) -> None:
    status = run.status()
    # A process that trains says itself how it ends; of a job that only waits, nobody else would.
    nobody_trains = status.open_attempt is None and lock_holder(run.folder) is None
    if nobody_trains and status.state != "cancelled" and not run.finished():
        status.record_outcome(CANCELLED)
        status.write(run.status_file)
        # Where W&B has it a damaged config does not say; mended, `reconcile` tells it.
        with contextlib.suppress(ConfigError):
            close_session(run)


def _end_process(run: Run) -> list[str]:
    """End the process that trains the run on this machine, as no job of Slurm."""
    attempt = run.status().open_attempt
    if not (attempt and attempt.job.cluster != "slurm" and lock_holder(run.folder)):
        return []
    job = attempt.job
    # A process id means another process, or none, on another host.
    if not same_host(job.host, socket.gethostname()):
        raise SubmissionError(f"process {job.pid} runs on {job.host}: cancel it from there")
    if not process_lives(job.pid, job.process):  # its id may be another process's by now
        if not lock_holder(run.folder):
            return []
        raise SubmissionError(
            f"process {job.pid} on {job.host} holds the run and cannot be seen from here (in "
            "another container?): cancel it from where it was started"
        )
    # A notebook's as its stop button does, so that the kernel lives; not a script that ignores that
    # signal, as a shell's in the background does.
    stops = job.is_from_python and not ignores(job.pid, signal.SIGINT)
    try:
        # The process that trains: submitit's controller starts nothing more when that ends.
        os.kill(job.pid, signal.SIGINT if stops else signal.SIGTERM)
    except ProcessLookupError:
        return []
    except PermissionError:
        raise SubmissionError(f"process {job.pid} is another user's to end") from None
    return [job.description]


def _end_slurm_jobs(cancelling: Sequence[_Cancelling]) -> None:
    """End every Slurm job of the runs; each is told what was ended, or what went wrong."""
    noted = jobs_of([each.run for each in cancelling])
    for each in cancelling:
        entries = noted[each.run]
        if isinstance(entries, Exception):  # the others are cancelled all the same
            each.error = SubmissionError(f"its jobs are unknown ({entries})")
        else:
            each.jobs = [noted_identity(entry) for entry in entries if entry.cluster == "slurm"]
            if entries and entries[-1].cluster == "slurm":
                each.newest = each.jobs[-1]
    answers = ask([job for each in cancelling for job in each.jobs])
    for each in cancelling:
        each.alive = [job for job in each.jobs if _lives(answers[job]) and job.is_mine()]
    lives_on = _shared_with_others(cancelling)
    to_end = [job.job_id for each in cancelling for job in each.alive if job not in lives_on]
    refused: SubmissionError | None = None
    try:
        scancel(*dict.fromkeys(to_end))
    except SubmissionError as error:
        refused = error
    for each in cancelling:
        # A job that lives on looks at the cancel file, and ends this run's process alone.
        shared = [job for job in each.jobs[-1:] if job in lives_on and not each.unnoted]
        own = [job for job in each.alive if job not in lives_on]
        each.ended = [f"its place in {job.description}" for job in shared] + [
            job.description for job in own
        ]
        failed = refused if own else None
        each.error = each.error or failed or _not_ended(each, answers)


def _shared_with_others(cancelling: Sequence[_Cancelling]) -> set[JobIdentity]:
    """Those of the jobs that have still to train runs which nobody cancels."""
    packs = {
        job: pack
        for each in cancelling
        for job in each.alive
        if (pack := pack_of(each.run, job.job_id))
    }
    # One whose jobs are unknown may be trained by any of them.
    runs = {each.run for each in cancelling if not each.error}
    return {job for job, pack in packs.items() if _trains_others(pack, job.job_id, runs)}


def _trains_others(pack: Pack, job_id: str, cancelled: Collection[Run]) -> bool:
    try:
        runs = pack.runs
    except ConfigError:  # its folder is gone; the runs know their job
        runs = [Run(pack.study, name) for name in run_names(pack.study)]
    return any(may_remain(run, job_id) for run in runs if run not in cancelled)


def _lives(answer: JobAnswer) -> bool:
    return isinstance(answer, Known) and not answer.over


def _not_ended(
    cancelling: _Cancelling, answers: Mapping[JobIdentity, JobAnswer]
) -> SubmissionError | None:
    why = ""
    for job in cancelling.jobs:
        answer = answers[job]
        if _lives(answer) and not job.is_mine():
            why = f"{job.description} is theirs to cancel (scancel {job.job_id})"
        elif isinstance(answer, Unknown) and job == cancelling.newest:
            why = f"{job.description} was not cancelled: {answer.why}"
    return SubmissionError(why) if why else None
