"""Ranks of one run leave at the same step, whichever of them is told to."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.data.dataset import load_datasets
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.ranks import Leave, Leaving, single_process
from flowjobs.training.trained import load_trained
from flowjobs.training.trainer import Trainer
from tests.cluster.waiting import wait_until
from tests.training import rank_job
from tests.training.same import same

# Coupled, it is validated in as many parts as there are batches, so that each rank has some.
CONFIG = TrainingConfig(epochs=5, flow="otcfm", arch=f"{__name__}:Normed")
Process = subprocess.Popen[str]

VOTE = """
import datetime, sys
from torch import distributed
from flowjobs.training.ranks import Leave, Leaving, Ranks
import torch
rank, world_size, port, wishes = int(sys.argv[1]), 3, sys.argv[2], eval(sys.argv[3])
distributed.init_process_group(
    "gloo", f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=900), world_size, rank
)
leaving = Leaving(Ranks(rank, world_size, torch.device("cpu")))
for boundary in range(8):
    leave = leaving.agreed(wishes.get((rank, boundary)))
    if leave:
        print(boundary, leave)
        break
leaving.wait()
distributed.destroy_process_group()
"""

TURNS = """
import sys
from pathlib import Path
import torch
from flowjobs.errors import ConfigError, RankFailedError
from flowjobs.runs.run import Run
from flowjobs.training import FlowDataset, TrainingConfig
from flowjobs.training.ranks import check_own_gpus, joined_ranks
from flowjobs.training.trainer import Trainer
file = Path(sys.argv[2])
with joined_ranks(int(sys.argv[1]), 2, 0, False) as ranks:
    with ranks.first_goes_first() as still_at_it:
        if ranks.is_first:
            for _ in range(3):
                still_at_it()
            file.touch()
        assert file.exists()
    try:
        with ranks.first_goes_first() as still_at_it:
            still_at_it()
            raise ValueError("of the first")
    except (ValueError, RankFailedError) as error:
        print(error)
    # As of a set of names, whose order is another in each process.
    names = sorted(("a", "b"), reverse=ranks.is_first)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in names})
    data = FlowDataset(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)))
    config = TrainingConfig(batch_size=32)
    try:
        Trainer(model, config, data, data, "cpu", run=Run(file.parent, "x"), ranks=ranks)
    except ConfigError as error:
        print(error)
    check_own_gpus(f"GPU-{ranks.rank}", 2)
    try:
        check_own_gpus("GPU-0", 2)
    except ConfigError as error:
        print(error)
"""


class Normed(nn.Module):
    """With chance, and statistics and a first scale that each rank has of its own rows.

    The rank that TOLD_IN_VALIDATION names is told to leave while it validates. In the step HELD_AT
    of a process it waits for the file "on".
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(dim), nn.Linear(dim, dim), nn.Dropout(0.1))
        self.scale = nn.Parameter(torch.zeros(dim))
        self.register_buffer("begun", torch.tensor(False))
        self.steps = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.steps += self.training
        if self.training and str(self.steps) == os.environ.get("HELD_AT"):
            Path("held").touch()
            wait_until(Path("on").exists, "the test", 600)
        if not self.begun:
            self.scale.data.copy_(1 / (1 + x.std(0)))
            self.begun.fill_(True)
        validates = not self.training and len(x) == CONFIG.batch_size  # each steps on half of it
        if validates and os.environ.get("TOLD_IN_VALIDATION") == os.environ.get("RANK", ""):
            os.kill(os.getpid(), signal.SIGTERM)
        return self.layers(x) * self.scale


def free_port() -> str:
    """Of those that the kernel hands to nobody: it stays free while the ranks load torch.

    Each worker of the tests has ports of its own, for two may come to look at once.
    """
    first = 17000 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for port in random.SystemRandom().sample(range(first, first + 100), 100):
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return str(port)
    raise AssertionError("no port is free")


def start(*arguments: object) -> Process:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def start_ranks(run: Run) -> list[Process]:
    run.create(RunConfig(CONFIG, tracking=TrackingConfig(wandb_mode="disabled")))
    port = free_port()
    return [start(rank_job.__file__, run.folder.absolute(), rank, 2, port) for rank in range(2)]


def end(processes: list[Process], expected: int) -> list[str]:
    """Wait for all; what each printed."""
    said = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [expected] * len(processes), said
    return [out for out, _ in said]


def test_a_signal_to_one_rank_makes_all_leave_at_the_same_step(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    whole, parts = Run(study, "whole"), Run(study, "parts")
    with monkeypatch.context() as patch:
        patch.setenv("TOLD_IN_VALIDATION", "1")
        said = end(start_ranks(parts), 75)
    assert said[0] == said[1]
    assert said[0].endswith("saved at step 23\n")  # an epoch's end
    assert "val/loss" not in parts.metrics_file.read_text()
    for rank, number in ((1, signal.SIGUSR2), (0, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            patch.setenv("HELD_AT", "30")
            processes = start_ranks(parts)
        wait_until(Path("held").exists, "the step", 600)
        processes[rank].send_signal(number)
        Path("on").touch()
        said = end(processes, 75)
        assert said[0] == said[1]
        assert number.name in said[0]
        assert said[0].endswith(f"saved at step {read_checkpoint(parts.last)['step']}\n")
        Path("held").unlink()
        Path("on").unlink()
    assert read_checkpoint(parts.last)["step"] < 5 * 23
    for run in (whole, parts):
        end(start_ranks(run), 0)
    assert same(read_checkpoint(whole.last), read_checkpoint(parts.last))
    assert same(read_checkpoint(whole.best), read_checkpoint(parts.best))
    assert list(read_rows(whole.metrics_file)) == list(read_rows(parts.metrics_file))
    assert load_trained(whole, "cpu").ranks == 2
    # The loss is that of the model which is saved.
    train, val = load_datasets(CONFIG.dataset, study)
    one_rank = Trainer(Normed(train.dim), CONFIG, train, val, torch.device("cpu"), run=whole)
    one_rank.state.restore(read_checkpoint(whole.best), whole.best)
    found = one_rank.state.best_loss
    assert one_rank._validation_loss() == pytest.approx(found, rel=1e-6)


def voted(wishes: dict[tuple[int, int], Leave]) -> list[str]:
    """What three ranks print that want to leave at (rank, boundary)."""
    port = free_port()
    return end([start("-c", VOTE, rank, port, repr(wishes)) for rank in range(3)], 0)


def test_the_reason_is_the_same_on_every_rank() -> None:
    early, late = Leave("SIGTERM"), Leave("SIGUSR2")
    assert voted({(2, 3): late, (1, 3): early, (0, 4): late}) == [f"4 {early}\n"] * 3


def test_a_lost_run_comes_before_any_other_reason_and_no_wish_is_no_reason() -> None:
    told, lost = Leave("SIGTERM"), Leave("job 2 holds the run", taken_over=True)
    assert voted({(0, 2): lost, (1, 2): told, (2, 2): told}) == [f"3 {lost}\n"] * 3
    assert voted({}) == [""] * 3


def test_the_first_rank_takes_its_time_and_ranks_of_other_models_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    said = end([start("-c", TURNS, rank, tmp_path / "file") for rank in range(2)], 0)
    failed = ["of the first", "the first rank failed before a step was trained"]
    assert [text.splitlines()[0] for text in said] == failed
    other_order = "the ranks have its parameters in different orders"
    assert all(other_order in text.splitlines()[1] for text in said)
    one_gpu = "ranks 0 and 1 have one GPU between them, expected one each"
    assert all(one_gpu in text.splitlines()[2] for text in said)


def test_a_single_process_leaves_at_once() -> None:
    leaving = Leaving(single_process(torch.device("cpu")))
    assert leaving.agreed(None) is None
    assert leaving.agreed(Leave("SIGTERM")) == Leave("SIGTERM")
    leaving.wait()
