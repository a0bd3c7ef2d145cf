"""When saves happen, and what the saver does when one cannot."""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flowjobs.data import read_ahead
from flowjobs.errors import CheckpointWriteError, RunTakenOverError
from flowjobs.training import saving
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.saving import CheckpointSaver
from flowjobs.training.snapshot import Snapshot


def state(step: int, best_loss: float = 1.0) -> dict[str, Any]:
    return {"format": 1, "step": step, "best_loss": best_loss, "weights": torch.full((4,), step)}


class Clock:
    """The time as the saver sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(saving.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(saving.time, "thread_time", lambda: self.now)


class Saver(CheckpointSaver):
    """A saver that can be waited for."""

    def settle(self) -> None:
        """Wait for the write under way and take note of how it ended."""
        self._collect()


@pytest.fixture
def make_saver(tmp_path: Path) -> Iterator[Callable[..., Saver]]:
    made = []

    def make(**options: Any) -> Saver:
        made.append(Saver(tmp_path / "best.pt", tmp_path / "last.pt", **options))
        return made[-1]

    yield make
    for saver in made:
        saver.close()


def due_times(saver: CheckpointSaver, clock: Clock, seconds: int, **options: bool) -> list[int]:
    """The seconds at which a save is due, when each costs nothing and is done at once."""
    start, found = clock.now, []
    for second in range(seconds):
        clock.now = start + second
        if saver.due(**options):
            found.append(second)
            saver._saved_at = clock.now
    return found


def test_saves_come_in_the_middle_of_an_epoch_as_often_as_asked(
    make_saver: Callable[..., Saver], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    assert due_times(make_saver(every_s=60), clock, 200, epoch_finished=False) == [60, 120, 180]
    assert due_times(make_saver(), clock, 700, epoch_finished=False) == [300, 600]
    assert due_times(make_saver(), clock, 35, epoch_finished=True) == [10, 20, 30]


@pytest.mark.parametrize("every_s", [0, 5, None])
def test_a_save_takes_one_percent_of_the_time_at_most(
    make_saver: Callable[..., Saver], monkeypatch: pytest.MonkeyPatch, every_s: float | None
) -> None:
    clock = Clock(monkeypatch)
    saver = make_saver(every_s=every_s)

    def cost_two_seconds(*arguments: object) -> int:
        clock.now += 2
        return 0

    monkeypatch.setattr(saving, "write_checkpoint", cost_two_seconds)
    saver.save(state(1))
    saver.settle()
    saved_at = saver._saved_at
    while not saver.due(epoch_finished=True):
        clock.now += 1
    assert clock.now - saved_at == 200


def failing_fsync(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)


def test_a_write_that_fails_is_told_once_a_cause_and_again_after_a_success(
    make_saver: Callable[..., Saver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saver = make_saver()
    caplog.set_level(logging.WARNING)
    said = []
    for code in (0, errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, 0, errno.EDQUOT):
        caplog.clear()
        with monkeypatch.context() as patched:
            if code:
                failing_fsync(patched, code)
            saver.save(state(code))
            saver.settle()
        said.append([record.getMessage() for record in caplog.records])
        assert read_checkpoint(tmp_path / "last.pt")["step"] == 0
    assert [len(messages) for messages in said] == [0, 1, 0, 1, 0, 1]
    assert "No space left" in said[1][0]
    assert "Disk quota exceeded" in said[3][0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_run_that_cannot_save_at_last_fails_and_keeps_what_is_there(
    make_saver: Callable[..., Saver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    saver = make_saver()
    saver.save_and_wait(state(1))
    failing_fsync(monkeypatch, code)
    with pytest.raises(CheckpointWriteError, match=f"last.pt could not be .*{os.strerror(code)}"):
        saver.save_and_wait(state(2))
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_a_slow_disk_stalls_no_step_and_is_spoken_of(
    make_saver: Callable[..., Saver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow, written = threading.Event(), threading.Event()
    real = os.fsync

    def wait(descriptor: int) -> None:
        written.set()
        assert slow.wait(600)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    monkeypatch.setattr(saving, "COST_SHARE", 1e9)  # every save would be affordable
    monkeypatch.setattr(saving, "SAY_AFTER_S", 1e-6)
    saver = make_saver(every_s=0)
    saver.save(state(1))
    assert written.wait(600)
    for step in range(2, 1000):
        assert not saver.due(epoch_finished=True)
        if step % 100 == 0:
            saver.keep_best(state(step, best_loss=1 / step))
    said = [record for record in caplog.records if "has not been written" in record.message]
    assert 0 < len(said) < 20  # after so long, and again after four times as long
    slow.set()
    saver.settle()
    assert saver.due(epoch_finished=True)
    saver.save_and_wait(state(1000))
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1000
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 900


def test_rows_are_on_disk_before_the_checkpoint_of_their_step(
    make_saver: Callable[..., Saver], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_saver().save_and_wait(state(1))
    saver = make_saver(flush_rows=fail)
    saver.save(state(2))
    saver.settle()
    assert "last.pt is not written before the rows" in caplog.text
    assert "No space left" in caplog.text
    with pytest.raises(CheckpointWriteError):
        saver.save_and_wait(state(2))
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_a_lost_run_is_noticed_and_never_written_again(
    make_saver: Callable[..., Saver], tmp_path: Path
) -> None:
    lost: list[str] = []

    def check_held() -> None:
        if lost:
            raise RunTakenOverError(lost[0])

    saver = make_saver(before_replace=check_held)
    saver.save_and_wait(state(1))
    lost.append("job 2 holds the run")
    saver.keep_best(state(2))
    saver.save(state(2))
    saver.settle()
    assert str(saver.taken_over) == "job 2 holds the run"
    lost.clear()
    with pytest.raises(RunTakenOverError, match="job 2"):
        saver.save_and_wait(state(3))
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert not (tmp_path / "best.pt").exists()


@pytest.mark.parametrize("write", ["beside", "last"])
def test_a_write_that_hangs_is_spoken_of_and_ends_in_an_error(
    make_saver: Callable[..., Saver],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    write: str,
) -> None:
    answers, real = threading.Event(), os.fsync

    def hang(descriptor: int) -> None:
        answers.wait()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", hang)
    monkeypatch.setattr(read_ahead, "SAY_AFTER_S", 0.01)
    for limit in ("WAIT_S", "WAIT_AFTER_ERROR_S"):
        monkeypatch.setattr(saving, limit, 0.05)
    saver = make_saver()
    try:
        if write == "beside":
            saver.save(state(1))
        with pytest.raises(CheckpointWriteError, match=r"last.pt has not been written for 0\.05"):
            saver.save_and_wait(state(2))
        assert "has not been written for 0.01 s; waiting" in caplog.text
        saver.save(state(3))
        saver.close_after_error()
        assert caplog.records[-1].levelname == "ERROR"
    finally:
        answers.set()


def test_a_copy_is_as_the_state_is_now_whatever_it_reuses() -> None:
    weights = {"w": torch.zeros(3), "said": {"count": 1}}
    first = Snapshot.of({"step": 1, "weights": weights, "names": ["w"]})
    weights["w"] += 1
    weights["said"]["count"] = 2  # a module may say its state in the same dict each time
    second = Snapshot.of({"step": 2, "weights": weights, "names": ["w"]}, first)
    assert second.payload["weights"]["said"] == {"count": 2}
    assert second.payload["weights"]["w"] is first.payload["weights"]["w"]
    weights["w"] += 1
    third = Snapshot.of({"step": 3, "weights": weights, "names": ["w"]}, second, held=True)
    assert third.payload["step"] == 3
    assert third.payload["weights"]["w"].tolist() == [2, 2, 2]
