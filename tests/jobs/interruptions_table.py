"""The table of what happens to a run: each test of a row holds it against what it saw."""

from pathlib import Path

from flowjobs.runs.status import RunStatus

TABLE = Path(__file__).with_name("interruptions.md")

# After these nobody could save: the run resumes from its last checkpoint.
SUDDEN = frozenset({"killed", "node failure", "segmentation fault", "out of memory", "exception"})


def assert_in_table(what: str, status: RunStatus, jobs: int, steps_lost: int) -> None:
    """The table has the row that this run is an example of.

    Args:
        what: What happened, as the table's first column says it.
        status: The run's.
        jobs: How many Slurm jobs it took.
        steps_lost: Steps that were done and had to be done again.
    """
    cells = (what, _what_the_run_did(status, jobs), _lost(status, steps_lost), _end(status))
    row = f"| {' | '.join(cells)} |"
    assert row in TABLE.read_text().splitlines(), f"{TABLE} lacks this row:\n{row}"


def _what_the_run_did(status: RunStatus, jobs: int) -> str:
    match status.state:
        case "failed":
            return f"stops, and says: {status.attempts[-1].kind}"
        case "cancelled":
            return "stops until it is submitted again"
    if len(status.attempts) == 1:
        return "does not notice"
    if jobs > 1:
        return "resumes as a new job"
    first, second, *_ = status.attempts
    if first.kind in ("killed", "lost GPU") and first.job.host != second.job.host:
        return "resumes in the same job, on another node"
    return "resumes in the same job"


def _lost(status: RunStatus, steps_lost: int) -> str:
    if status.attempts[0].kind in SUDDEN:
        return "since the last checkpoint"
    assert steps_lost == 0
    return "0"


def _end(status: RunStatus) -> str:
    match status.state:
        case "finished":
            return "finished, same bits"
        case "failed":
            return f"failed, exit code {status.exit_code}"
    return status.state
