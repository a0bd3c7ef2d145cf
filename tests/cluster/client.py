"""Slurm's client commands and what they print."""

import os
import re
import subprocess
from pathlib import Path

from tests.cluster.waiting import ClusterError

# Of sacct, in this order; -D adds a row for every earlier start of a requeued job.
ACCOUNTING_FIELDS = (
    "JobID",
    "JobIDRaw",
    "JobName",
    "Partition",
    "State",
    "ExitCode",
    "DerivedExitCode",
    "Submit",
    "Start",
    "End",
    "ElapsedRaw",
    "NodeList",
    "Comment",
)
_SEPARATOR = "\x1f"

# "Key=value Key=value": a value may hold spaces, so it ends only where the next key begins.
_FIELD = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=(.*?)(?=\s+[A-Za-z][\w:/]*=|\s*$)")


class CommandError(ClusterError):
    """A client command failed; `returncode` and `stderr` say how."""

    def __init__(self, command: tuple[str, ...], returncode: int, stderr: str) -> None:
        super().__init__(f"{' '.join(command)} exited with {returncode}: {stderr.strip()}")
        self.returncode = returncode
        self.stderr = stderr


def run_client(slurm_conf: Path, command: tuple[str, ...], timeout_s: float = 120) -> str:
    """Runs a client command and returns what it printed.

    Raises:
        CommandError: it failed, or did not end in time.
    """
    # Inside a Slurm job, the job's own variables would change what the commands do.
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    try:
        done = subprocess.run(
            command,
            env=outer | {"SLURM_CONF": str(slurm_conf)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # a test may give a job a name that is no text
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(command, -1, f"no end after {timeout_s:g} s") from error
    if done.returncode:
        raise CommandError(command, done.returncode, done.stderr)
    return done.stdout


def parse_fields(line: str) -> dict[str, str]:
    """The fields of one record that `scontrol show … --oneliner` printed, first one wins."""
    fields: dict[str, str] = {}
    for key, value in _FIELD.findall(line):
        fields.setdefault(key, value)
    return fields


def accounting_command(job_id: str) -> tuple[str, ...]:
    """The sacct call for every start of a job."""
    fields = ",".join(ACCOUNTING_FIELDS)
    return ("sacct", "-XDnP", f"--delimiter={_SEPARATOR}", "-j", job_id, "-o", fields)


def parse_accounting(text: str) -> list[dict[str, str]]:
    """The rows that `accounting_command` printed."""
    rows = [line.split(_SEPARATOR) for line in text.splitlines()]
    return [dict(zip(ACCOUNTING_FIELDS, row, strict=True)) for row in rows]
