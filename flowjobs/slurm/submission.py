"""Submitting with sbatch: the job is known by a mark of ours, not by what is printed."""

import contextlib
import logging
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowjobs.errors import SubmissionError, SubmissionUnknownError
from flowjobs.slurm.client import first_line, run_command
from flowjobs.slurm.cluster import cluster_name
from flowjobs.slurm.controller import ENDED, JobRow, cancel, queue

logger = logging.getLogger(__name__)

# What sbatch prints with --parsable, with the cluster if one was asked for; and what it prints
# without, where a wrapper drops that option.
_SAID_ID = re.compile(r"(\d+)(?:;([\w.-]+))?")

_SUBMITTED = re.compile(r"Submitted batch job (\d+)(?: on cluster [\w.-]+)?")

# sbatch itself tries again for two minutes where the controller is too busy to take a job.
SBATCH_TIMEOUT_S = 180.0

# An answer that did not come: a busy controller may take the job all the same, and later.
UNANSWERED = re.compile(
    r"timed out|did not answer|Message (send|receive) failure|Zero Bytes", re.IGNORECASE
)
TAKEN_WITHIN_S = 20.0
ASK_EVERY_S = 1.0

# How far the clocks of two machines may differ.
CLOCKS_S = 300.0


@dataclass(frozen=True)
class AcceptedJob:
    """A job that sbatch has accepted.

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
def cancelled_unless_noted(accepted: Callable[[], AcceptedJob | None]) -> Iterator[None]:
    """Cancel a job that sbatch accepts in the block if the block then fails: nobody knows it.

    Raises:
        SubmissionError: The block failed so, and the job is cancelled.
        SubmissionUnknownError: The block failed so, and the job may live; the text says how to end
            it.
    """
    try:
        yield
    except BaseException as error:
        job = accepted()
        if job is None:
            raise
        said = f"job {job.job_id} was submitted, but could not be noted ({error})"
        here = cluster_name() if job.cluster else ""
        command = f"scancel {job.job_id}"
        try:
            if here != job.cluster:  # its id is another job's here, or none's
                command = f"scancel -M {job.cluster} {job.job_id}"
                raise SubmissionError(f"it is of {job.cluster}, and {here or 'none'} answers here")
            cancel(job.job_id)
        except SubmissionError as refused:
            raise SubmissionUnknownError(
                f"{said}, and it is not cancelled either ({refused}): {command}"
            ) from error
        raise SubmissionError(f"{said}: it is cancelled") from error


def new_mark() -> str:
    """A mark that no other job has."""
    return secrets.token_hex(6)


def sbatch(
    command: Sequence[str], environment: Mapping[str, str], mark: str | None = None
) -> AcceptedJob:
    """Submit by a command line (`sbatch OPTIONS SCRIPT ARGUMENTS`), with a mark in the comment.

    What `sbatch` prints is not believed where it is more than an id: sites wrap it, and print
    lines of their own. The mark finds the job then, also where sbatch failed after it had
    submitted the job.

    Args:
        command: The command line.
        environment: What sbatch sees.
        mark: The mark, where the caller keeps it before; default: a new one.

    Raises:
        SubmissionError: sbatch refused the job.
        SubmissionUnknownError: What became of the job is unknown; the text says how to find it.
    """
    mark = mark or new_mark()
    program, *rest = command
    comments = [word for word in rest if word.startswith("--comment=")]
    comment = comments[-1].partition("=")[2] if comments else environment.get("SBATCH_COMMENT", "")
    marked = " ".join([*comment.split(), f"flowjobs:{mark}"])
    # On the command line: there accounting keeps it too (SubmitLine), and it wins over the script.
    rest = [word for word in rest if word not in comments]
    asked_at = time.time()
    answer = run_command(
        *(program, "--parsable", f"--comment={marked}", *rest),
        environment=environment,
        timeout_s=SBATCH_TIMEOUT_S,
    )
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode == 0 and len(lines) == 1 and (found := _SAID_ID.fullmatch(lines[0])):
        return AcceptedJob(found[1], found[2] or cluster_name(), mark)
    said = {found[1]: found[2] or "" for line in lines if (found := _SAID_ID.fullmatch(line))}
    said |= {found[1]: "" for line in lines if (found := _SUBMITTED.fullmatch(line))}
    unanswered = answer.returncode != 0 and bool(UNANSWERED.search(answer.stderr))
    ours, silent = _taken(mark, said, asked_at, wait_s=TAKEN_WITHIN_S if unanswered else 0.0)
    if ours:
        return AcceptedJob(ours[0].job_id.partition("_")[0], ours[0].cluster, mark)
    elsewhere = [(job_id, cluster) for job_id, cluster in said.items() if cluster]
    if answer.returncode == 0 and elsewhere:
        return AcceptedJob(*elsewhere[0], mark)
    if silent or unanswered or (answer.returncode == 0 and said):
        why = silent or "none is in the queue that is known by it, or by the id and its time"
        raise SubmissionUnknownError(
            f"sbatch said: {_words_of(answer)}; whether the job was taken is unknown ({why}): one "
            f"with the comment flowjobs:{mark} would be it (squeue --me -o '%i %k'): cancel that, "
            "then submit again"
        )
    raise SubmissionError(_refusal(answer))


def _taken(
    mark: str, said: Collection[str], asked_at: float, wait_s: float
) -> tuple[list[JobRow], str]:
    """The job that has the mark, looked for in the queue; and why nothing is known of it."""
    deadline = time.monotonic() + wait_s
    if wait_s:
        logger.warning("sbatch got no answer; looking for the job, up to %.0f s", wait_s)
    while True:
        ours, silent = [], ""
        try:
            rows = queue({os.getuid()})
        except SubmissionError as error:
            silent = str(error)
        else:
            # Where the site drops comments, an id that sbatch has said is one if it is that of a
            # new job; the clocks of two machines may differ.
            new = [row for row in rows if row.submitted >= asked_at - CLOCKS_S and not row.marks]
            ours = [row for row in rows if mark in row.marks] or [
                row for row in new if row.job_id.partition("_")[0] in said
            ]
            # A job that was refused stays with the controller for minutes, as one that failed on
            # no node.
            ours = [row for row in ours if row.nodes or row.state not in ENDED]
        if ours or time.monotonic() >= deadline:
            return ours, silent
        time.sleep(ASK_EVERY_S)


def _refusal(answer: subprocess.CompletedProcess[str]) -> str:
    if answer.returncode == 0:
        return f"sbatch printed no job id, and no new job is in the queue: {first_line(answer)}"
    return f"sbatch refused the job: {_words_of(answer)}"


def _words_of(answer: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in answer.stderr.splitlines() if "error" in line.lower()]
    return "; ".join(lines) or first_line(answer)
