"""A fault at every file operation of a save, one by one: an error, or death in the middle of it.

After each, a start finds the state before the save or the one after it, whole.
"""

import builtins
import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from flowjobs.errors import CheckpointWriteError
from flowjobs.training.checkpoint import read_newest_good, sweep_unfinished
from flowjobs.training.saving import CheckpointSaver
from tests.training import warm_process

Fault = Callable[[], None]


class FaultyFile:
    """A file open for writing; a fault in the middle of a write leaves the first half."""

    def __init__(self, file: BinaryIO, point: Fault) -> None:
        self._file = file
        self._point = point

    def write(self, data: bytes) -> int:
        try:
            self._point()
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextlib.contextmanager
def fault_at(number: int, fault: Fault, *, hard_links: bool) -> Iterator[list[str]]:
    """Let the file operation of this number (from 0) meet the fault. Gives their names."""
    operations: list[str] = []

    def point(name: str) -> None:
        operations.append(name)
        if len(operations) == number + 1:
            fault()

    def faulty(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            point(name)
            return real(*arguments, **options)

        return call

    def link(*names: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    real_open = builtins.open

    def open_file(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode != "w+b":
            return real_open(path, mode, *rest, **options)
        point("open")
        # Unbuffered, so that what was written before a death is there after it.
        file = real_open(path, mode, *rest, **{**options, "buffering": 0})
        return FaultyFile(file, lambda: point("write"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_file)
        for name in ("fsync", "replace", "unlink", "link"):
            patch.setattr(os, name, faulty(name, getattr(os, name)))
        if not hard_links:
            patch.setattr(os, "link", faulty("link", link))
        yield operations


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def state(step: int) -> dict[str, Any]:
    return {"format": 1, "step": step, "best_loss": 1 / step, "weights": torch.full((9,), step)}


def make_saver(folder: Path) -> CheckpointSaver:
    return CheckpointSaver(folder / "best.pt", folder / "last.pt")


def save(folder: Path, step: int) -> None:
    saver = make_saver(folder)
    saver.keep_best(state(step))
    saver.save_and_wait(state(step))
    saver.close()


def prepare(folder: Path) -> None:
    folder.mkdir()
    for step in (1, 2):
        save(folder, step)


def check(folder: Path) -> int:
    """What a start finds must be whole. Returns the step that it goes on from."""
    last, best = (read_newest_good(folder / name) for name in ("last.pt", "best.pt"))
    assert last is not None
    assert best is not None
    assert last["step"] in {2, 3}
    assert best["best_loss"] <= last["best_loss"]
    for payload in (last, best):
        assert torch.equal(payload["weights"], torch.full((9,), payload["step"]))
    assert not list(folder.glob("*.damaged-*"))
    return int(last["step"])


def check_it_goes_on(folder: Path) -> None:
    for name in ("last.pt", "best.pt"):
        sweep_unfinished(folder / name)
    save(folder, 4)
    last = read_newest_good(folder / "last.pt")
    assert last is not None
    assert last["step"] == 4
    names = {file.name for file in folder.iterdir()}
    previous = {"best.previous.pt", "last.previous.pt"}
    assert names == {"best.pt", "last.pt"} | previous


def operations_of_a_save(folder: Path, hard_links: bool) -> list[str]:
    prepare(folder)
    with fault_at(-1, fail, hard_links=hard_links) as operations:
        save(folder, 3)
    assert check(folder) == 3
    return operations


@pytest.mark.parametrize("hard_links", [True, False])
def test_an_error_at_any_file_operation_leaves_a_good_state(
    tmp_path: Path, hard_links: bool
) -> None:
    operations = operations_of_a_save(tmp_path / "clean", hard_links)
    assert operations.count("open") == 2
    assert operations.count("write") > 20
    assert operations.count("fsync") == 6  # for each file: twice, and its folder
    assert operations.count("link") == 2
    assert operations.count("replace") == 4
    found = set()
    for number, operation in enumerate(operations):
        folder = tmp_path / str(number)
        prepare(folder)
        saver = make_saver(folder)
        with fault_at(number, fail, hard_links=hard_links) as met:
            saver.keep_best(state(3))
            with contextlib.suppress(CheckpointWriteError):
                saver.save_and_wait(state(3))
        assert met[number] == operation
        found.add(check(folder))
        # What failed is tried again, with the best that it was about to write.
        saver.save_and_wait(state(3))
        saver.close()
        assert check(folder) == 3
        check_it_goes_on(folder)
    assert found == {2, 3}


def die_at_each(folder: Path, hard_links: bool) -> None:
    """Runs where nothing but this is loaded and a fork is cheap."""
    found = set()
    for number in range(len(operations_of_a_save(folder / "clean", hard_links))):
        place = folder / str(number)
        prepare(place)
        child = os.fork()
        if child == 0:
            with fault_at(number, die, hard_links=hard_links):
                save(place, 3)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        found.add(check(place))
        check_it_goes_on(place)
    assert found == {2, 3}


@pytest.mark.parametrize("hard_links", [True, False])
def test_death_at_any_file_operation_leaves_a_good_state(tmp_path: Path, hard_links: bool) -> None:
    log = tmp_path / "log"
    process = warm_process.start(die_at_each, tmp_path, hard_links, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()
