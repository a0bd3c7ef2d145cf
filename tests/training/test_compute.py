"""How many threads a run computes with, and that it keeps them."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError, RunInterrupted
from flowjobs.field_values import KeyValues
from flowjobs.jobs.exit_cause import transient_kind
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.compute import computing, computing_as_before, usable_cores
from flowjobs.training.ranks import Ranks, joined_ranks, single_process
from tests.data.test_memory import machine
from tests.training.same import same
from tests.training.test_trainer import train_in

CPU = torch.device("cpu")
LARGE = 10**12
JOB_OF_THE_RUN = {"SLURM_JOB_ID": "7", "FLOWJOBS_JOB": "7"}
CONFIG = TrainingConfig(epochs=2, arch_args=KeyValues(width=64, depth=1))
CASES: dict[str, tuple[dict[str, str], dict[str, str], int, int]] = {
    "all that the machine has": ({}, {}, 1, 8),
    "two ranks on one machine": ({}, {}, 2, 4),
    "slurm's cores of a task": ({}, {"SLURM_CPUS_PER_TASK": "3"}, 1, 3),
    "bound by slurm to fewer": ({}, {"SLURM_CPUS_PER_TASK": "16"}, 1, 8),
    "slurm's cores of a node": ({}, {"SLURM_CPUS_ON_NODE": "6"}, 2, 3),
    "two nodes": ({}, {"SLURM_CPUS_ON_NODE": "6", "SLURM_STEP_NUM_NODES": "2"}, 4, 3),
    "more ranks than cores": ({}, {}, 9, 1),
    "a quota, version 2": (
        {"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "150000 100000\n"},
        {},
        1,
        2,
    ),
    "no quota of its own": (
        {
            "proc/self/cgroup": "0::/pod/step\n",
            "sys/fs/cgroup/pod/step/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
        },
        {},
        1,
        3,
    ),
    "of four that share a job": ({}, {"SLURM_CPUS_PER_TASK": "8", "FLOWJOBS_SLOTS": "4"}, 1, 2),
    "of more than there are cores": ({}, {"SLURM_CPUS_PER_TASK": "2", "FLOWJOBS_SLOTS": "4"}, 1, 1),
    "version 1": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/not-here\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        {},
        1,
        1,
    ),
}


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS")


@pytest.mark.parametrize("case", CASES)
def test_a_rank_uses_the_cores_that_it_has(tmp_path: Path, case: str) -> None:
    files, environment, ranks, expected = CASES[case]
    assert usable_cores(ranks, machine(tmp_path, files), environment) == expected


@pytest.mark.parametrize(
    ("flops", "environment", "expected"),
    [
        (80_000_000, {}, 1),  # the default model
        (2_560_000_000, {}, 2),
        (LARGE, {"SLURM_CPUS_PER_TASK": "5"}, 5),
        (320_000_000, {}, 1),
        (320_000_000, {"SLURM_CPUS_PER_TASK": "8", **JOB_OF_THE_RUN}, 6),
        (320_000_000, {"SLURM_CPUS_ON_NODE": "8", "FLOWJOBS_SLOTS": "4", **JOB_OF_THE_RUN}, 2),
        (320_000_000, {"SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}, 1),  # a shell of salloc's
        (80_000_000, {"OMP_NUM_THREADS": "3"}, 3),
        (LARGE, {"OMP_NUM_THREADS": "2,1"}, 2),
    ],
)
def test_threads_are_as_many_as_help_or_as_are_asked_for(
    flops: int, environment: dict[str, str], expected: int
) -> None:
    before = torch.get_num_threads()
    with computing(single_process(CPU), flops, environment) as now:
        assert now.threads == torch.get_num_threads() == expected
    assert torch.get_num_threads() == before


def next_or_stop(steps: Iterator[int]) -> str | None:
    return None if next(steps, None) is not None else "stop"


def test_a_run_keeps_the_threads_that_it_began_with(
    study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, parts = Run(study, "whole"), Run(study, "parts")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    train_in(whole, CONFIG)
    for number in ("3", "", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", number)
        steps = iter(range(15))
        with suppress(RunInterrupted):
            train_in(parts, CONFIG, stop_reason=partial(next_or_stop, steps))
    assert read_checkpoint(parts.last)["computed_with"]["threads"] == 3
    assert same(read_checkpoint(whole.last), read_checkpoint(parts.last))
    assert "so far" not in caplog.text


def test_what_is_another_than_before_is_said_with_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    two = Ranks(0, 2, CPU)
    with computing(two, 1, {}) as now:
        before = now.to_dict()
        assert computing_as_before(now, before, {}) == now
        assert computing_as_before(now, {}, {}) == now  # a checkpoint that does not say
        assert not caplog.records
        kept = computing_as_before(now, {**before, "threads": 4}, {})
        assert kept.threads == torch.get_num_threads() == 4
        assert not caplog.records
        computing_as_before(now, {**before, "threads": 4, "ranks": 4}, {"OMP_NUM_THREADS": "1"})
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "so far this run used ranks 4, now 2: it resumes" in caplog.text
    assert "ask for as many (--nodes, --gpus-per-node)" in caplog.text
    assert "so far this run used threads 4, now 1: it resumes" in caplog.text


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can use a GPU")
def test_a_gpu_is_not_held_for_a_torch_that_cannot_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr("flowjobs.slots.GPUS_OF_NVIDIA", tmp_path / "gpus")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with joined_ranks(0, 1, 0, use_gpu=True) as ranks:  # of a laptop it is not worth a refusal
        assert ranks.device == CPU
    assert "is a build without CUDA" in caplog.text
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with (
        pytest.raises(ConfigError, match=r"a build without CUDA.*--gpus-per-node 0"),
        joined_ranks(0, 1, 0, use_gpu=True),
    ):
        pass
    with joined_ranks(0, 1, 0, use_gpu=False) as ranks:
        assert ranks.device == CPU


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can use a GPU")
def test_a_gpu_whose_driver_is_gone_is_a_lost_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a build with CUDA this is all that is there on such a node; the driver has no folder.
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("flowjobs.slots.GPUS_OF_NVIDIA", tmp_path / "gpus")
    monkeypatch.setattr("flowjobs.slots.DEVICES", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with joined_ranks(0, 1, 0, use_gpu=True) as ranks:  # a laptop without one
        assert ranks.device == CPU
    monkeypatch.setenv("SLURM_STEP_GPUS", "0")
    with pytest.raises(RuntimeError) as lost, joined_ranks(0, 1, 0, use_gpu=True):
        pass
    assert transient_kind(lost.value) == "lost GPU"
