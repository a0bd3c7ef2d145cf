"""Asking Slurm. Robust forms only: see each function for what the short ones get wrong."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from flowjobs.config import SBATCH_VARIABLES, SlurmConfig
from flowjobs.errors import SubmissionError

# The job's name is how it is recognized later, its output how `logs` finds it; one run is no array.
ALWAYS_DECIDED = {
    "SBATCH_JOB_NAME",
    "SBATCH_OUTPUT",
    "SBATCH_ERROR",
    "SBATCH_OPEN_MODE",
    "SBATCH_ARRAY_INX",
}

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


def environment_for_sbatch(environment: Mapping[str, str], asked: SlurmConfig) -> dict[str, str]:
    """The environment for sbatch, without what would overrule the batch file.

    sbatch takes SLURM_* variables of a job it is called from (an interactive one, say) for the
    new job's; those that say which cluster to talk to stay. Of the SBATCH_* variables, which win
    over the file, those stay that the file does not decide.

    Args:
        environment: The environment of this process.
        asked: What the batch file is made from.
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"}
    foreign = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
    decided = {
        variable for variable, name in SBATCH_VARIABLES.items() if getattr(asked, name) is not None
    }
    decided |= ALWAYS_DECIDED
    return {
        name: value
        for name, value in environment.items()
        if name in kept or not (name.startswith(foreign) or name in decided)
    }


def minutes(time_limit: str) -> int:
    """A time limit in one of sbatch's forms ("90", "1:30:00", "2-12") in minutes, rounded up.

    Raises:
        ValueError: It is of none of those forms, or no limit at all ("UNLIMITED", "0").
    """
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", time_limit):
        raise ValueError(time_limit)
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, mins, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, (mins, secs) = 0, (*parts, 0)[:2]
    total = int(days or 0) * 1440 + hours * 60 + mins + (1 if secs else 0)
    if total == 0:
        raise ValueError(time_limit)
    return total


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
