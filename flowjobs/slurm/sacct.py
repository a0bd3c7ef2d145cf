"""How jobs ended, by Slurm's accounting."""

import math
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence

from flowjobs.errors import SubmissionError
from flowjobs.slurm.client import MARK, SEPARATOR, cells_of, first_line, run_command, timestamp
from flowjobs.slurm.controller import JobRow
from flowjobs.slurm.submission import CLOCKS_S

# What is tried where the time that one query may be about is limited (MaxQueryTimeRange).
RANGES_D = (math.inf, 90, 30, 7, 1)

# Asked by a job that may be killed any moment, of what it can do without.
SUBMIT_LINE_WITHIN_S = 5.0


def accounting_answers() -> bool:
    """Whether there is accounting, so that it can be asked how a job ended."""
    return run_command("sacct", "-X", "-n", "-S", "now").returncode == 0


def accounting(submitted_at: Mapping[str, float]) -> list[JobRow] | None:
    """Every start of all jobs that have or had these ids on this cluster, oldest first.

    One call for all of them. Accounting is some seconds behind the controller.

    Args:
        submitted_at: By the id of each job, when it was submitted, in seconds of the epoch; 0 if
            that is not known.

    Returns:
        None where the cluster has no accounting, or none that can be asked from here.

    Raises:
        SubmissionError: Accounting does not answer.
    """
    if not submitted_at:
        return []
    if shutil.which("sacct") is None:
        return None
    fields: tuple[str, ...] = (
        *("JobID", "State", "UID", "Cluster", "Submit", "End", "ExitCode", "NodeList"),
        *("DerivedExitCode", "JobName", "Comment", "SubmitLine"),
    )
    answer = _ask_accounting(submitted_at, fields)
    if answer.returncode != 0 and "Invalid field" in answer.stderr:
        fields = fields[:-1]  # before Slurm 21.08
        answer = _ask_accounting(submitted_at, fields)
    for days in RANGES_D:
        # Only about jobs that are younger: of another the answer would lack the first starts.
        oldest = time.time() - days * 86400
        recent = [job_id for job_id, at in submitted_at.items() if at > max(0, oldest)]
        if not recent or "date range" not in answer.stderr:
            break
        since = min(submitted_at[job_id] for job_id in recent) - CLOCKS_S
        answer = _ask_accounting(recent, fields, since)
    if answer.returncode != 0:
        if "accounting storage is disabled" in answer.stderr:
            return None
        raise SubmissionError(f"accounting does not answer: {first_line(answer)}")
    rows = []
    for cells in cells_of(answer.stdout, len(fields)):
        job_id, state, uid, cluster, submitted, ended, code, nodes, derived, name, *told = cells
        # The job's own code is 11:0 after a segmentation fault as after exit(11); that of its steps
        # tells them apart, 0:11 and 11:0.
        exit_code, _, number = (derived if derived not in ("", "0:0") else code).partition(":")
        rows.append(
            JobRow(
                job_id=job_id,
                state=(state.split() or [""])[0],
                uid=int(uid) if uid.isdigit() else -1,
                cluster=cluster,
                name=name,
                submitted=timestamp(submitted) or 0.0,
                ended=timestamp(ended),
                exit_code=int(exit_code) if exit_code.isdigit() else 0,
                signal=int(number) if number.isdigit() else 0,
                nodes=nodes,
                marks=frozenset(MARK.findall(" ".join(told))),
            )
        )
    return rows


def submit_line(job_id: str) -> str:
    """The command that a job was submitted by, its words as they are; empty if nobody says."""
    ask = ("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "SubmitLine")
    answer = run_command(*ask, timeout_s=SUBMIT_LINE_WITHIN_S)
    lines = [line for line in answer.stdout.splitlines() if "sbatch " in line]
    return lines[-1] if answer.returncode == 0 and lines else ""


def _ask_accounting(
    job_ids: Collection[str], fields: Sequence[str], since: float | None = None
) -> subprocess.CompletedProcess[str]:
    # -D for every start, and for older jobs of the same id; -X without the steps. About jobs by
    # their ids it is asked since 1970 unless it is told otherwise.
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    return run_command(
        *("sacct", "-X", "-D", "-n", "-P", f"--delimiter={SEPARATOR}"),
        *("-j", ",".join(sorted(job_ids)), "-o", ",".join(fields)),
        *(() if since is None else ("-S", start)),
    )
