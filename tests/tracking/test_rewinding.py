"""A run that goes on after a sudden death on other hardware: W&B has the rows that count."""

import time
from pathlib import Path

import pytest

from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.tracking.server import Server
from flowjobs.tracking.sync import sync_run
from tests.tracking import attempts
from tests.tracking.attempts import make_run
from tests.tracking.backend import KEY, Backend
from tests.tracking.history import on_server, run_to_the_end, without_picture

COMMON = 5000


@pytest.fixture
def run(study: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that was killed when its server had more than the steps that come out the same."""
    run = make_run(study, "online")
    monkeypatch.setenv("NO_CHECKPOINT", "1")
    process = attempts.start(run, 100_000, pace_s=0.02)
    deadline = time.monotonic() + 60
    while not backend.runs() or not (rows := on_server(run, backend).rows) or last(rows) <= COMMON:
        assert time.monotonic() < deadline, "no row came"
        time.sleep(0.05)
    attempts.kill(*attempts.mirror_and_core(process.pid), process.pid)
    attempts.finish(process)
    monkeypatch.setenv("OTHER_BITS_PAST", str(COMMON))
    return run


def last(rows: list[attempts.Row]) -> int:
    return int(rows[-1]["step"])


def assert_server_has_what_counts(run: Run, backend: Backend) -> None:
    rows = list(read_rows(run.metrics_file))
    assert rows == [attempts.row_at(step) for step in range(10, last(rows) + 1, 10)]
    found = on_server(run, backend)
    assert without_picture(found.rows) == rows
    assert found.dropped == []
    assert found.state == "finished"


@pytest.mark.parametrize(("pace_s", "sessions"), [(0.0, 2), (0.01, 3)])
def test_the_server_forgets_the_rows_of_the_work_that_was_lost(
    run: Run, backend: Backend, pace_s: float, sessions: int
) -> None:
    lost = last(on_server(run, backend).rows)
    code, said = attempts.finish(attempts.start(run, lost + 500, pace_s))
    assert code == 0, said
    assert f"step {COMMON + 10} does not come out as it did before" in said
    assert_server_has_what_counts(run, backend)
    # Known before the second session began, or while it went on.
    assert on_server(run, backend).sessions == sessions


def test_a_server_that_was_away_meanwhile_gets_them_by_sync(run: Run, backend: Backend) -> None:
    lost = last(on_server(run, backend).rows)
    backend.go_down()
    run_to_the_end(run, lost + 500)
    backend.come_back()
    assert sync_run(run, Server(backend.url, KEY), lambda *_: None).state == "uploaded"
    assert_server_has_what_counts(run, backend)
    assert sync_run(run, Server(backend.url, KEY), lambda *_: None).state == "unchanged"


def test_a_server_that_cannot_forget_keeps_them_and_gets_the_rest(
    run: Run, backend: Backend
) -> None:
    backend.can_rewind = False
    before = on_server(run, backend).rows
    run_to_the_end(run, last(before) + 500)
    found = on_server(run, backend)
    rows = list(read_rows(run.metrics_file))
    assert without_picture(found.rows) == before + rows[len(before) :]
    assert found.state == "finished"
    said = (run.folder / "wandb" / "mirror.log").read_text()
    assert said.count(f"W&B keeps other values past step {COMMON}") == 1
