"""Asking Slurm. Robust forms only: see each function for what the short ones get wrong."""

import os
import re
import shutil
import subprocess

from flowjobs.errors import SubmissionError

# Clients wait MessageTimeout (10 s by default) for a controller that is away.
CLIENT_TIMEOUT_S = 30


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


def queued_state(job_id: str, job_name: str) -> str | None:
    """The state of a job in the queue ("PENDING", "RUNNING", …), or None if it is not there.

    The name is compared too, since a cluster may use an id again after a crash.

    Raises:
        SubmissionError: Slurm does not answer.
    """
    # Not --json: it ignores -j in Slurm 22.05. Not -j: it fails for a job that has been forgotten,
    # which cannot be told from a controller that is away. -r lists the tasks of an array.
    answer = _run("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%j")
    if answer.returncode != 0:
        raise SubmissionError(
            f"Slurm does not say whether job {job_id} is still there: {_first_line(answer)}; "
            "try again when it answers"
        )
    for line in answer.stdout.splitlines():
        found_id, state, name = line.strip().split("|", 2)
        if found_id == job_id and name == job_name:
            return state
    return None


def job_output_file(job_id: str) -> str | None:
    """The file that a job's output goes to, or None if Slurm does not say."""
    answer = _run("scontrol", "show", "job", job_id)
    found = re.search(r"^\s*StdOut=(.+)$", answer.stdout, flags=re.MULTILINE)
    return found.group(1) if found else None


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    # Without the limit on bit strings Slurm cuts long lists of array tasks short.
    environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=CLIENT_TIMEOUT_S,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr=str(error))


def _first_line(answer: subprocess.CompletedProcess[str]) -> str:
    lines = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
    return lines[0] if lines else f"exit code {answer.returncode}"
