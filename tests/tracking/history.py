"""What the tests of tracking claim of a run's history, online and offline."""

import subprocess
import time

from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome
from flowjobs.tracking.process import close_session, pending_outcome
from tests.tracking import attempts
from tests.tracking.backend import Backend, RunOnServer
from tests.tracking.leet import offline_rows, session_files


def on_server(run: Run, backend: Backend) -> RunOnServer:
    """The run as the server has it."""
    return backend.run(run.tracking_id())


def assert_history_is_exact(run: Run, backend: Backend | None) -> None:
    """Every row of metrics.jsonl once, in order, with its values; nothing else.

    Args:
        run: A run whose rows are those of `attempts`.
        backend: Its server; None reads its offline files.
    """
    rows = list(read_rows(run.metrics_file))
    assert rows == [attempts.row_at(10 * number) for number in range(1, len(rows) + 1)]
    if backend is None:
        assert without_picture(offline_rows(run)) == rows
        return
    found = on_server(run, backend)
    assert without_picture(found.rows) == rows
    assert [row["_step"] for row in found.received] == [row["step"] for row in rows]


def is_quiet(stderr: str) -> bool:
    """Whether no more is said than that an upload takes a while, as on a busy machine."""
    return all(line.startswith("uploading ") for line in stderr.splitlines())


def without_picture(rows: list[attempts.Row]) -> list[attempts.Row]:
    """The rows as training recorded them; the last row of a finished run holds its picture too."""
    return [
        {key: value for key, value in row.items() if not key.startswith("samples")} for row in rows
    ]


def has_picture(row: attempts.Row) -> bool:
    """Whether a row holds the run's picture."""
    return any(key.startswith("samples") for key in row)


def wait_until_open(run: Run, backend: Backend | None) -> None:
    """Wait until the session has begun where it goes."""
    deadline = time.monotonic() + 600
    while not (session_files(run) if backend is None else backend.runs()):
        assert time.monotonic() < deadline, "no session began"
        time.sleep(0.05)
    time.sleep(0.5)


def write_end(run: Run, outcome: Outcome) -> None:
    """Write down how the newest attempt ended, as who finds it out does."""
    status = run.status()
    status.record_outcome(outcome)
    status.write(run.status_file)


def run_to_the_end(run: Run, last_step: int) -> str:
    """One attempt that finishes. Returns what it said."""
    return finish_and_tell(run, attempts.start(run, last_step))


def finish_and_tell(run: Run, process: "subprocess.Popen[str]", exit_code: int = 0) -> str:
    """Wait for an attempt that ends with this code, and have W&B told. Returns what it said."""
    code, said = attempts.finish(process)
    assert code == exit_code, said
    tell(run)
    return said


def tell(run: Run) -> None:
    """Tell W&B how a run ended for which it came too late, as on a machine that is busy."""
    for _ in range(3):
        if pending_outcome(run):
            close_session(run)
