"""`metrics.jsonl`: what becomes of rows that come again."""

import logging
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.runs.metrics import MetricsFile, read_rows
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo

ROWS = [{"step": step, "train/loss": 1 / step} for step in (10, 20, 30)]


def write(path: Path, after_step: int, rows: list[dict[str, float]]) -> list[int | None]:
    metrics = MetricsFile(path, after_step)
    common = []
    for row in rows:
        common.append(metrics.notice_other_values(row))
        if common[-1] is not None:
            metrics.forget_lost()
        metrics.append(row)
    metrics.close()
    return common


def test_rows_that_come_again_are_there_once_and_other_values_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, ROWS)
    with caplog.at_level(logging.WARNING):
        assert write(path, 10, ROWS[1:]) == [None, None]
        assert list(read_rows(path)) == ROWS
        assert caplog.text == ""
        others = [row | {"train/loss": 0.1} for row in ROWS[1:]]
        assert write(path, 10, others) == [10, None]
    assert list(read_rows(path)) == [ROWS[0], *others]
    assert caplog.text.count("was repeated with other values") == 1
    assert "step 20 " in caplog.text


def test_that_rows_came_again_with_other_values_is_on_record_at_once(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig()))
    with recording(run, JobInfo.in_foreground()) as recorder:
        recorder.start_at(0)
        for row in ROWS:
            recorder.record(row)
    with recording(run, JobInfo.in_foreground()) as recorder:
        recorder.start_at(10)
        recorder.record(ROWS[1] | {"train/loss": 0.1})
        assert run.status().diverged_after == 10  # it may be killed now


def test_what_was_lost_is_remembered_until_it_has_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, ROWS)
    assert write(path, 10, ROWS[1:2]) == [None]  # an attempt that leaves before it is at row 30
    other = [row | {"train/loss": 0.1} for row in ROWS[2:]]
    assert write(path, 20, other) == [20]
    assert list(read_rows(path)) == [*ROWS[:2], *other]
    # W&B has had these rows forgotten, so what it had first does not count any more.
    assert write(path, 20, other) == [None]
    assert list(tmp_path.glob("metrics*")) == [path]
