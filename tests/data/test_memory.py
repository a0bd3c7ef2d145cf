"""Data that is larger than memory: what is free, and what a run on a large file takes."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flowjobs.cgroups import memory_kills
from flowjobs.config import TrainingConfig
from flowjobs.data import row_reader
from flowjobs.data.dataset import normalization_stats, split
from flowjobs.data.memory import free_memory_bytes
from flowjobs.data.tensor_file import write_tensor
from flowjobs.errors import DataError
from flowjobs.field_values import KeyValues
from flowjobs.runs.run import Run
from flowjobs.training import FlowDataset
from flowjobs.training.checkpoint import read_checkpoint
from tests.training.test_trainer import same, train_in

MB = 1024**2
FILE_MB = 300


def machine(root: Path, files: dict[str, str]) -> Path:
    """A machine of which 100 MB are available, and a process that holds 10."""
    machines = {
        "proc/meminfo": "MemTotal: 999999 kB\nMemAvailable: 102400 kB\n",
        "proc/self/status": "Name:\tpython\nVmRSS:\t10240 kB\n",
        "proc/self/cgroup": "",
    }
    for name, text in (machines | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


STAT_V2 = f"anon 1\nactive_file {3 * MB}\ninactive_file {2 * MB}\n"
STAT_V1 = f"total_active_file {3 * MB}\ntotal_inactive_file {2 * MB}\n"
CASES: dict[str, tuple[dict[str, str], dict[str, str], int]] = {
    "the machine": ({}, {}, 100),
    "slurm's limit": ({}, {"SLURM_MEM_PER_NODE": "50"}, 40),
    "slurm's limit is spent": ({}, {"SLURM_MEM_PER_NODE": "5"}, 0),
    "four runs share a job": ({}, {"SLURM_MEM_PER_NODE": "80", "FLOWJOBS_SLOTS": "4"}, 10),
    "four runs share a machine": ({}, {"FLOWJOBS_SLOTS": "4"}, 25),
    "slurm gives all of the node": ({}, {"SLURM_MEM_PER_NODE": "0"}, 100),
    "version 2": (
        {
            "proc/self/cgroup": "0::/slurm/job_1\n",
            "sys/fs/cgroup/slurm/job_1/memory.max": f"{30 * MB}\n",
            "sys/fs/cgroup/slurm/job_1/memory.current": f"{20 * MB}\n",
            "sys/fs/cgroup/slurm/job_1/memory.stat": STAT_V2,
        },
        {},
        15,
    ),
    "the job's step has no limit of its own": (
        {
            "proc/self/cgroup": "0::/job_1/step\n",
            "sys/fs/cgroup/job_1/step/memory.max": "max\n",
            "sys/fs/cgroup/job_1/step/memory.current": "1\n",
            "sys/fs/cgroup/job_1/memory.max": f"{60 * MB}\n",
            "sys/fs/cgroup/job_1/memory.current": f"{20 * MB}\n",
            "sys/fs/cgroup/job_1/memory.stat": STAT_V2,
        },
        {},
        45,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job_1\n",
            "sys/fs/cgroup/memory/job_1/memory.limit_in_bytes": f"{30 * MB}\n",
            "sys/fs/cgroup/memory/job_1/memory.usage_in_bytes": f"{10 * MB}\n",
            "sys/fs/cgroup/memory/job_1/memory.stat": STAT_V1,
        },
        {},
        25,
    ),
    "a container whose path is the host's": (
        {
            "proc/self/cgroup": "4:cpu,memory:/docker/not-here\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{30 * MB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{10 * MB}\n",
            "sys/fs/cgroup/memory/memory.stat": STAT_V1,
        },
        {},
        25,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_free_is_the_least_of_the_machines_and_the_jobs(tmp_path: Path, case: str) -> None:
    files, environment, expected_mb = CASES[case]
    assert free_memory_bytes(machine(tmp_path, files), environment) == expected_mb * MB


@pytest.mark.parametrize(
    ("group", "file", "text"),
    [
        ("0::/job_1/step", "sys/fs/cgroup/job_1/step/memory.events", "low 0\noom 4\noom_kill 3\n"),
        ("4:memory:/job_1", "sys/fs/cgroup/memory/job_1/memory.oom_control", "oom_kill 3\n"),
    ],
    ids=["version 2", "version 1"],
)
def test_what_the_kernel_killed_for_memory_is_counted(
    tmp_path: Path, group: str, file: str, text: str
) -> None:
    assert memory_kills(machine(tmp_path, {"proc/self/cgroup": f"{group}\n", file: text})) == 3
    assert memory_kills(machine(tmp_path / "other", {"proc/self/cgroup": "0::/\n"})) == 0


def test_this_machine_has_free_memory(tmp_path: Path) -> None:
    assert 0 < free_memory_bytes() < free_memory_bytes(tmp_path)  # there: all, as without /proc


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """300 MB of noise, 768 columns."""
    path = tmp_path_factory.mktemp("data") / "large.npy"
    n = FILE_MB * MB // (768 * 4)
    noise = np.random.default_rng(0).standard_normal((n // 100, 768), dtype=np.float32)
    np.save(path, np.resize(noise, (n, 768)))
    yield path
    path.unlink()


# Prints the memory that the work took beyond what the imports take, in MB.
MEASURED = """
import sys, json
from pathlib import Path
import torch
import flowjobs.training.run_training
from flowjobs.config import TrainingConfig
from flowjobs.field_values import KeyValues
from flowjobs.data.dataset import *
from flowjobs.data.batches import *
from flowjobs.training import FlowTrainer
from flowjobs.models.build import build_model

def peak_mb():
    # Not ru_maxrss: over exec it keeps the peak of the process that started this one.
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == "VmHWM:") / 1024

def train(path):
    config = TrainingConfig(
        dataset=path, epochs=1, batch_size=1024, arch_args=KeyValues(width=16, depth=1)
    )
    parts = load_datasets(path, Path("study"))
    model = build_model(config, parts[0].dim)
    trainer = FlowTrainer(model, config, *parts, torch.device("cpu"))
    trainer.train()
    return type(trainer._pairs._batches).__name__

def split_file(path):
    return write_splits(FlowDataset(path), Path("study"), {"all": None})

torch.nn.Linear(768, 768)(torch.randn(1024, 768)).sum().backward()
before = peak_mb()
result = {"train": train, "split": split_file}[sys.argv[1]](sys.argv[2])
print(json.dumps([result, peak_mb() - before]))
"""


def measured(what: str, path: Path, **environment: str) -> tuple[object, float]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, what, str(path)],
        env={**os.environ, "WANDB_MODE": "disabled", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result, took = json.loads(done.stdout.splitlines()[-1])
    return result, took


def test_a_file_larger_than_the_jobs_memory_is_trained_on(large_file: Path) -> None:
    batches, took = measured("train", large_file, SLURM_MEM_PER_NODE="64")
    assert batches == "LoadedBatches"
    assert took < 2 / 3 * FILE_MB


def test_an_array_whose_copy_does_not_fit_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "64")
    file = tmp_path / "zeros.npy"
    np.lib.format.open_memmap(file, "w+", np.float32, (65 * MB // 4000, 1000))
    with pytest.raises(DataError, match=r"0.1 GB.*memory, and 0.0 GB are free: .*mmap_mode='c'"):
        FlowDataset(np.load(file, mmap_mode="r"))
    assert FlowDataset(np.load(file, mmap_mode="c")).shape == (1000,)


def test_a_file_larger_than_memory_is_split(large_file: Path, study: Path) -> None:
    written, took = measured("split", large_file)
    assert took < 2 / 3 * FILE_MB
    train, _ = split(FlowDataset(large_file))
    assert written == {"all": len(train)}
    saved = FlowDataset(study / "datasets/splits/all/train.pt")
    assert torch.equal(saved[-100:], train[-100:])
    assert torch.equal(saved[:100], train[:100])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [1, 5])
def test_a_tensor_written_in_parts_is_the_file_of_torch_save(
    tmp_path: Path, dtype: torch.dtype, dim: int
) -> None:
    data = torch.randn(11, dim).to(dtype)
    path = tmp_path / "data.pt"
    write_tensor(path, (11, dim), dtype, iter(data.split(4)))
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert loaded.dtype == dtype
        assert torch.equal(loaded, data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert [found for found in tmp_path.iterdir() if found.is_file()] == [path]


def test_too_few_rows_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="12 bytes of rows for a tensor of shape"):
        write_tensor(tmp_path / "data.pt", (2, 3), torch.float32, [torch.zeros(1, 3)])
    assert [found for found in tmp_path.iterdir() if found.is_file()] == []


@pytest.mark.parametrize("pieces", [(row_reader.PIECE_BYTES, row_reader.PIECES_AT_ONCE), (60, 3)])
def test_rows_that_are_read_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, int]
) -> None:
    monkeypatch.setattr("flowjobs.data.dataset.LARGE_BYTES", 0)
    for name, value in zip(("PIECE_BYTES", "PIECES_AT_ONCE"), pieces, strict=True):
        monkeypatch.setattr(row_reader, name, value)
    data = torch.randn(50, 7)
    torch.save(data[5:].to(torch.bfloat16), tmp_path / "data.pt")  # not from the storage's start
    np.save(tmp_path / "data.npy", data.numpy())
    np.save(tmp_path / "fortran.npy", np.asfortranarray(data.numpy()))
    expected = {
        "data.pt": data[5:].to(torch.bfloat16).float(),
        "data.npy": data,
        "fortran.npy": data,
    }
    for name, rows in expected.items():
        read = FlowDataset(tmp_path / name)
        is_read_whole = isinstance(read._source, torch.Tensor)
        assert is_read_whole == (name == "fortran.npy")  # not row by row in the file
        assert torch.equal(read[[3, 4, 5, 1, 1, -1]], rows[[3, 4, 5, 1, 1, -1]])
        assert torch.equal(read[7:30], rows[7:30])
        assert torch.equal(read[[]], rows[[]])
        assert torch.equal(torch.stack(list(read)), rows)
        assert torch.equal(read.part(torch.tensor([9, 2, 3]), "")[0:2], rows[[9, 2]])
        mask = rows[:, 0] > 0
        for of in (mask, mask.tolist()):
            assert torch.equal(read[of], rows[mask])
        part = read.part(mask, "")
        assert torch.equal(part.data.float(), rows[mask])
        assert len(part) == int(mask.sum())
        for wrong in ([len(rows)], mask[1:]):
            with pytest.raises(IndexError):
                read[wrong]


def test_a_file_that_is_cut_short_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowjobs.data.dataset.LARGE_BYTES", 0)
    path = tmp_path / "data.npy"
    np.save(path, np.zeros((10, 3), dtype=np.float32))
    read = FlowDataset(path)
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(DataError, match=r"data\.npy ends at byte 200: it was cut short"):
        read[0:10]


def test_a_part_is_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowjobs.data.dataset.CHUNK_BYTES", 4 * 3 * 8)
    data = torch.randn(50, 3)
    whole = FlowDataset(data)
    index = torch.randperm(50)[:30]
    part, copied = whole.part(index, "part"), FlowDataset(data[index])
    assert torch.equal(part.data, copied.data)
    assert torch.equal(part[[3, 7]], copied[[3, 7]])
    assert torch.equal(part[4:9], copied[4:9])
    assert torch.equal(part[5], copied[5])
    assert torch.equal(part.part(torch.tensor([2, 0]), "two").data, copied.data[[2, 0]])
    assert torch.equal(torch.cat(list(part.in_order())), copied.data)
    filled = torch.empty(30, 3)
    for indices, rows in part.in_order_of_file():
        filled[indices] = rows
    assert torch.equal(filled, copied.data)
    for key, value in normalization_stats(copied).items():
        assert torch.allclose(normalization_stats(part)[key], value, rtol=1e-6)


def test_a_file_gives_the_bits_of_its_split(study: Path, tmp_path: Path) -> None:
    data = torch.randn(400, 6)
    torch.save(data, tmp_path / "whole.pt")
    parts = split(FlowDataset(data))
    folder = study / "datasets/splits/copied"
    folder.mkdir(parents=True)
    torch.save(parts[0].data, folder / "train.pt")
    torch.save(parts[1].data, folder / "val.pt")
    payloads = []
    for dataset, placement in (
        ("copied", "device"),
        (str(tmp_path / "whole.pt"), "device"),
        (str(tmp_path / "whole.pt"), "loader"),
    ):
        config = TrainingConfig(
            dataset=dataset,
            epochs=2,
            arch_args=KeyValues(width=16, depth=1),
            data_placement=placement,  # type: ignore[arg-type]
        )
        run = Run(study, f"run{len(payloads)}")
        train_in(run, config)
        payloads.append(read_checkpoint(run.last))
    for payload in payloads[1:]:
        assert same(payload["model_state_dict"], payloads[0]["model_state_dict"])
        assert same(payload["normalization_stats"], payloads[0]["normalization_stats"])
        assert payload["best_loss"] == payloads[0]["best_loss"]
