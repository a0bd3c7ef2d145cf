"""How jobs ended, by Slurm's accounting."""

import shutil
import subprocess
from collections.abc import Collection, Sequence

from flowjobs.errors import SubmissionError
from flowjobs.slurm.client import MARK, SEPARATOR, cells_of, first_line, run, timestamp
from flowjobs.slurm.controller import JobRow


def accounting_answers() -> bool:
    """Whether there is accounting, so that it can be asked how a job ended."""
    return run("sacct", "-X", "-n", "-S", "now").returncode == 0


def accounting(job_ids: Collection[str]) -> list[JobRow] | None:
    """Every start of all jobs that have or had these ids on this cluster, oldest first.

    One call for all of them. Accounting is some seconds behind the controller.

    Returns:
        None where the cluster has no accounting, or none that can be asked from here.

    Raises:
        SubmissionError: Accounting does not answer.
    """
    if not job_ids:
        return []
    if shutil.which("sacct") is None:
        return None
    fields: tuple[str, ...] = (
        *("JobID", "State", "UID", "Cluster", "Submit", "End", "ExitCode", "NodeList"),
        *("DerivedExitCode", "JobName", "Comment", "SubmitLine"),
    )
    answer = _ask_accounting(job_ids, fields)
    if answer.returncode != 0 and "Invalid field" in answer.stderr:
        fields = fields[:-1]  # before Slurm 21.08
        answer = _ask_accounting(job_ids, fields)
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


def _ask_accounting(
    job_ids: Collection[str], fields: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    # -D for every start, and for older jobs of the same id; -X without the steps.
    return run(
        *("sacct", "-X", "-D", "-n", "-P", f"--delimiter={SEPARATOR}"),
        *("-j", ",".join(sorted(job_ids)), "-o", ",".join(fields)),
    )
