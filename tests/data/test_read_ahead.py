"""Reading beside the training: its order, its errors, and that it keeps no process from its end."""

import errno
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.data import read_ahead
from flowjobs.data.batches import Order
from flowjobs.data.read_ahead import ReadAhead, read_in_time
from flowjobs.data.source import NormalSource
from flowjobs.errors import DataError
from flowjobs.field_values import KeyValues
from flowjobs.flows.coupling import exact
from flowjobs.flows.pairs import CoupledPairs
from flowjobs.jobs.exit_cause import transient_kind
from flowjobs.models.build import build_model
from flowjobs.runs.run import Run
from flowjobs.training import FlowDataset
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.trainer import Trainer
from tests.training.same import same
from tests.training.test_trainer import train_in

CONFIG = TrainingConfig(
    epochs=1, arch_args=KeyValues(width=8, depth=1), data_placement="loader", num_workers=2
)


def numbers(delay: Callable[[int], None] = lambda number: None) -> Iterator[Callable[[], Tensor]]:
    def read(number: int) -> Tensor:
        delay(number)
        return torch.tensor(number)

    return (partial(read, number) for number in itertools.count())


@pytest.mark.parametrize("n_threads", [0, 1, 3])
def test_results_come_in_the_order_in_which_they_were_asked_for(n_threads: int) -> None:
    second = threading.Event()

    def first_is_last(number: int) -> None:
        if number == 1:
            second.set()
        if number == 0 and n_threads > 1:
            assert second.wait(240)

    ahead = ReadAhead(numbers(first_is_last), n_threads, "data")
    assert [int(ahead.next()) for _ in range(20)] == list(range(20))


def test_a_read_that_does_not_end_is_an_error_with_its_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(read_ahead, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr(read_ahead, "END_S", 0.1)
    comes_back = threading.Event()
    never = numbers(lambda number: comes_back.wait(240) and None)
    ahead = ReadAhead(never, 1, "train.pt", wait_s=0.2)
    with pytest.raises(DataError, match=r"train\.pt has given no rows for 0.2 s") as raised:
        ahead.next()
    assert "train.pt has given no rows for 0.1 s; waiting" in caplog.text
    assert transient_kind(raised.value) == "file system"
    comes_back.set()


def test_a_plan_is_waited_for_to_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(read_ahead, "SAY_AFTER_S", 0.01)
    monkeypatch.setattr(read_ahead, "WAIT_S", 0.02)
    config = TrainingConfig(flow="otcfm", batch_size=4, ot_batch=8)
    computed = threading.Event()

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "0.04 s" in record.getMessage():
                computed.set()

    def slow(x_0: Tensor, x_1: Tensor, sigma: float, seed: int) -> Tensor:
        assert computed.wait(240)
        return exact(x_0, x_1, sigma, seed)

    monkeypatch.setattr("flowjobs.flows.pairs.BUILT_IN_COUPLINGS", {slow})
    monkeypatch.setattr(read_ahead.logger, "handlers", [Said()])
    pairs = CoupledPairs(StepNumbers(), NormalSource((2,)), slow, config, 0)
    assert len(pairs.at(0)[1]) == 4
    assert "the plan of otcfm for 8 rows (--ot-batch) has given no rows for 0.01 s" in caplog.text


def test_a_file_that_is_cut_short_or_unreadable_ends_the_training_with_its_name(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowjobs.data.dataset.LARGE_BYTES", 0)
    path = Path("data.npy").absolute()
    np.save(path, np.random.default_rng(0).standard_normal((400, 5), dtype=np.float32))
    data = FlowDataset(path)
    model = build_model(CONFIG, data.dim)
    trainer = Trainer(model, CONFIG, data, data, torch.device("cpu"), run=Run(study, "a"))

    def stale(*arguments: object) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", stale)
        with pytest.raises(DataError, match=r"data\.npy, byte \d+: Stale file handle") as raised:
            trainer.train()
    assert transient_kind(raised.value) == "file system"
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(DataError, match=r"data\.npy ends at byte \d+: it was cut short"):
        Trainer(model, CONFIG, data, data, torch.device("cpu"), run=Run(study, "b"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"source": "data.npy"},
        {"source": "data.npy", "flow": "otcfm"},
        {"data_placement": "loader", "num_workers": 0},
    ],
    ids=["validation", "source", "plans", "no workers"],
)
def test_a_file_that_stops_answering_ends_the_training_whoever_reads_it(
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr("flowjobs.data.dataset.LARGE_BYTES", 0)
    monkeypatch.setattr(read_ahead, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr(read_ahead, "WAIT_S", 0.4)
    np.save("data.npy", np.random.default_rng(0).standard_normal((400, 5), dtype=np.float32))
    hangs, comes_back, preadv = threading.Event(), threading.Event(), os.preadv

    def read(*arguments: Any) -> int:
        if hangs.is_set():
            comes_back.wait(240)
        return preadv(*arguments)

    monkeypatch.setattr("os.preadv", read)
    device = replace(CONFIG, dataset="data.npy", batch_size=32, data_placement="device")
    try:
        with pytest.raises(DataError, match=r"data\.npy has given no rows for 0\.4 s: ") as raised:
            # Asked after each step.
            train_in(Run(study, "a"), replace(device, **options), stop_reason=hangs.set)
    finally:
        comes_back.set()
    assert "data.npy has given no rows for 0.1 s; waiting" in caplog.text
    assert transient_kind(raised.value) == "file system"


def test_reads_that_come_share_one_thread_and_a_reader_reads_in_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def thread_of_read() -> int:
        return read_in_time(threading.get_ident, "data")

    threads = {thread_of_read() for _ in range(20)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    reads = itertools.repeat(lambda: thread_of_read() == threading.get_ident())
    own = {wait_s: ReadAhead(reads, 1, "data", wait_s).next() for wait_s in (240.0, None)}
    assert own == {240.0: True, None: False}  # nobody else has a limit for a plan's reads
    # A process that a DataLoader forks has none of the threads.
    monkeypatch.setattr(read_ahead, "WAIT_S", 60.0)
    if not (child := os.fork()):
        code = 1
        try:
            code = read_in_time(lambda: 0, "data")
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_run_reads_the_same_rows_with_any_number_of_threads(study: Path) -> None:
    runs = [Run(study, f"readers{n}") for n in (0, 1, 4)]
    for run, n in zip(runs, (0, 1, 4), strict=True):
        train_in(run, replace(CONFIG, num_workers=n))
    first, *others = (read_checkpoint(run.last) for run in runs)
    assert all(same(first["model_state_dict"], other["model_state_dict"]) for other in others)


class StepNumbers:
    """Batches of rows that say of which step they are, as the threads of a run read them."""

    steps_per_epoch = 100
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.is_locked: Callable[[], bool] = lambda: True
        self.read_unlocked: list[int] = []

    def rows(self, step: int) -> Tensor:
        if not self.is_locked():
            self.read_unlocked.append(step)
        return torch.full((4, 2), float(step))


def broken_off(*_: object) -> None:
    raise KeyboardInterrupt


def test_after_ctrl_c_in_a_wait_each_step_gets_its_own_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a notebook, which keeps the exception, and with it the reader whose result is lost."""
    config, batches = TrainingConfig(flow="otcfm", batch_size=4, ot_batch=8), StepNumbers()
    pairs = CoupledPairs(batches, NormalSource((2,)), exact, config, 0)
    # Two threads seldom read at once; whether they could, each look shows.
    batches.is_locked = pairs._reading.locked
    assert [float(pairs.at(step)[1][0, 0]) for step in range(4)] == [0, 1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(ReadAhead, "_wait_for", broken_off)
        with pytest.raises(KeyboardInterrupt) as kept:
            pairs.at(4)
    assert [float(pairs.at(step)[1][0, 0]) for step in range(2, 9)] == list(range(2, 9))
    assert batches.read_unlocked == []
    assert kept.type is KeyboardInterrupt


def test_after_ctrl_c_in_the_shuffle_an_epoch_has_its_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def order() -> Order:
        return Order(64, CONFIG, 0, 1, torch.device("cpu"))

    interrupted = order()
    interrupted.indices(0)
    with monkeypatch.context() as patch:
        patch.setattr("flowjobs.data.batches.epoch_order", broken_off)
        with pytest.raises(KeyboardInterrupt):
            interrupted.indices(1)
    assert torch.equal(interrupted.indices(1), order().indices(1))


HANGS_AND_ENDS = """
import sys, threading, time
from torch import nn

class Model(nn.Module):
    def __init__(self, dim, what):
        super().__init__()
        self.layer = nn.Linear(dim, dim)
        self.what = what

    def forward(self, x, t):
        if self.what == "thread":
            threading.Thread(target=time.sleep, args=(1e6,), name="of the model").start()
            sys.exit(0)
        raise ValueError("the model fails")
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("readers", "ValueError (models.py, line 15, in forward): the model fails"),
        ("thread", "UserCodeExitError (models.py, line 14, in forward): exit(0) was called"),
    ],
)
def test_a_model_that_raises_or_exits_fails_the_run_and_ends_the_process(
    study: Path, what: str, said: str
) -> None:
    """Also where readers have read ahead, or a thread of the model's own never ends."""
    Path("models.py").write_text(HANGS_AND_ENDS)
    command = [sys.executable, "-m", "flowjobs", "train", "--arch", "models:Model", "--flow"]
    command += ["icfm", "--arch-args", f"what={what}", "--data-placement", "loader"]
    command += ["--name", "a", "--wandb-mode", "disabled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    assert f"error: {said}" in done.stderr
    assert ("of the model did not end" in done.stderr) == (what == "thread")
    status = Run(study, "a").status()
    assert (status.state, status.reason) == ("failed", said)
