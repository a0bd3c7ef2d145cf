"""Ends the jobs of runs because their user wants no more of them."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from flowjobs import slurm
from flowjobs.errors import FlowjobsError, SubmissionError
from flowjobs.runs.files import flush_files
from flowjobs.runs.lock import lock_holder
from flowjobs.runs.pack import pack_of
from flowjobs.runs.run import Run
from flowjobs.runs.status import CANCELLED, RunStatus, same_host
from flowjobs.slurm import JobAnswer, JobIdentity, Known, Unknown, ask
from flowjobs.tracking.closing import close_session

# W&B is told by a process for each run, which takes a second of CPU.
TOLD_AT_ONCE = 4


def cancel(run: Run) -> str:
    """Cancel a run and every job of it. Returns what was done.

    Raises:
        SubmissionError: Slurm does not answer. The run is noted as cancelled all the same: a job
            of it that starts again sees that and ends.
    """
    ((_, said),) = cancel_together([run])
    if isinstance(said, FlowjobsError):
        raise said
    return said


def cancel_together(runs: Sequence[Run]) -> Iterator[tuple[Run, str | FlowjobsError]]:
    """Cancel runs and every job of them; Slurm is asked once and told once.

    Yields:
        Each run with what was done, or why that could not be.
    """
    done = {run for run in runs if run.finished()}
    wanted = [run for run in runs if run not in done]
    for run in wanted:  # first: a job that is just being requeued must see it
        run.request_cancel(flush=False)
    flush_files(run.cancel_file for run in wanted)
    ended = _end_slurm_jobs(wanted)
    with ThreadPoolExecutor(TOLD_AT_ONCE) as threads:
        told = {run: threads.submit(_end_and_note, run, ended[run]) for run in wanted}
        for run in runs:
            if run in done:
                yield run, f"{run.name} is finished; there is nothing to cancel"
                continue
            try:
                yield run, told[run].result()
            except FlowjobsError as error:
                yield run, error


def _end_and_note(run: Run, in_slurm: list[str] | SubmissionError) -> str:
    if isinstance(in_slurm, SubmissionError):
        raise in_slurm
    ended = in_slurm + _end_process(run)
    status = run.status() or RunStatus()
    # A process that trains says itself how it ends; of a job that only waits, nobody else would.
    nobody_trains = status.open_attempt is None and lock_holder(run.folder) is None
    if nobody_trains and status.state != "cancelled":
        status.close(CANCELLED)
        status.write(run.status_file)
        if status.attempts:  # else W&B has never heard of it
            close_session(run, CANCELLED)
    if ended:
        return f"{run.name}: cancelled {', '.join(ended)}; submit it again to resume"
    return f"{run.name}: no job of it waits or runs; nothing will start it again"


def _end_process(run: Run) -> list[str]:
    """End the process that trains the run on this machine, as no job of Slurm."""
    status = run.status()
    attempt = status.open_attempt if status else None
    if not (attempt and attempt.job.cluster in ("local", "none") and lock_holder(run.folder)):
        return []
    job = attempt.job
    # A process id means another process, or none, on another host.
    if not same_host(job.host, socket.gethostname()):
        raise SubmissionError(
            f"{run.name} runs as process {job.pid} on {job.host}: cancel it from there; "
            "it is noted as cancelled and will not be started again"
        )
    with contextlib.suppress(ProcessLookupError):
        # The process that trains: submitit's controller starts nothing more when that ends.
        os.kill(job.pid, signal.SIGTERM)
        return [f"process {job.pid}"]
    return []


def _end_slurm_jobs(runs: Sequence[Run]) -> dict[Run, list[str] | SubmissionError]:
    """End every job of the runs. Returns the jobs of each, as text, or what went wrong."""
    jobs = {
        run: [JobIdentity.of(e) for e in run.submissions() if e["cluster"] == "slurm"]
        for run in runs
    }
    answers = ask([job for of_run in jobs.values() for job in of_run])
    alive = {
        run: [job for job in of_run if _lives(answers[job]) and job.is_mine()]
        for run, of_run in jobs.items()
    }
    lives_on = _shared_with_others(alive)
    to_end = {run: [job for job in of_run if job not in lives_on] for run, of_run in alive.items()}
    refused: SubmissionError | None = None
    try:
        slurm.cancel(*dict.fromkeys(job.job_id for of_run in to_end.values() for job in of_run))
    except SubmissionError as error:
        refused = error
    ended: dict[Run, list[str] | SubmissionError] = {}
    for run in runs:
        if refused and to_end[run]:
            ended[run] = refused
        elif unknown := _not_ended(run, jobs[run], answers):
            ended[run] = unknown
        else:
            # A job that lives on looks at the mark, and ends this run's process alone.
            places = [f"its place in {job.words}" for job in jobs[run][-1:] if job in lives_on]
            ended[run] = places + [job.words for job in to_end[run]]
    return ended


def _shared_with_others(alive: Mapping[Run, Sequence[JobIdentity]]) -> set[JobIdentity]:
    """Those of the jobs that have still to train runs which nobody cancels."""
    packs = {
        job: pack
        for run, of_run in alive.items()
        for job in of_run
        if (pack := pack_of(run, job.job_id))
    }
    return {job for job, pack in packs.items() if pack.left(job.job_id)}


def _lives(answer: JobAnswer) -> bool:
    return isinstance(answer, Known) and not answer.over


def _not_ended(
    run: Run, jobs: Sequence[JobIdentity], answers: Mapping[JobIdentity, JobAnswer]
) -> SubmissionError | None:
    why = ""
    for job in jobs:
        answer = answers[job]
        if _lives(answer) and not job.is_mine():
            why = f"{job.words} is theirs to cancel (scancel {job.job_id})"
        elif isinstance(answer, Unknown) and job == jobs[-1]:
            # Of older ones it does not matter: the newest was submitted when they were gone.
            why = f"{job.words} was not cancelled: {answer.why}"
    if not why:
        return None
    return SubmissionError(
        f"{run.name}: {why}; the run is noted as cancelled: a job of it that starts sees that, "
        "and ends"
    )
