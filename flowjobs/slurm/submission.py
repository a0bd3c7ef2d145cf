"""Submitting with sbatch: the job is known by a mark of ours, not by what is printed."""

import contextlib
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowjobs.errors import SubmissionError, SubmissionUnknownError
from flowjobs.slurm.client import first_line, run
from flowjobs.slurm.cluster import cluster_name
from flowjobs.slurm.controller import ENDED, cancel, queue

# What sbatch prints with --parsable, with the cluster if one was asked for; and what it prints
# without, where a wrapper drops that option.
_SAID_ID = re.compile(r"(\d+)(?:;([\w.-]+))?")

_SUBMITTED = re.compile(r"Submitted batch job (\d+)(?: on cluster [\w.-]+)?")

# How far the clocks of two machines may differ.
CLOCKS_S = 300.0


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


def new_mark() -> str:
    """A mark that no other job has."""
    return secrets.token_hex(6)


def sbatch(
    command: Sequence[str], environment: Mapping[str, str], mark: str | None = None
) -> HandedOver:
    """Submit by a command line (`sbatch OPTIONS SCRIPT ARGUMENTS`), with a mark in the comment.

    What `sbatch` prints is not believed where it is more than an id: sites wrap it, and print
    lines of their own. The mark finds the job then, also where sbatch failed after it had handed
    the job over.

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
    answer = run(*(program, "--parsable", f"--comment={marked}", *rest), environment=environment)
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode == 0 and len(lines) == 1 and (found := _SAID_ID.fullmatch(lines[0])):
        return HandedOver(found[1], found[2] or cluster_name(), mark)
    said = {found[1]: found[2] or "" for line in lines if (found := _SAID_ID.fullmatch(line))}
    said |= {found[1]: "" for line in lines if (found := _SUBMITTED.fullmatch(line))}
    try:
        rows = [row for row in queue({os.getuid()}) if row.submitted >= asked_at - CLOCKS_S]
    except SubmissionError as error:
        raise SubmissionUnknownError(
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
        return f"sbatch printed no job id, and no new job is in the queue: {first_line(answer)}"
    lines = [line.strip() for line in answer.stderr.splitlines() if "error" in line.lower()]
    return f"sbatch refused the job: {'; '.join(lines) or first_line(answer)}"
