"""A study of 10,000 runs: what `status` costs, in CPU, memory and files that it opens."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrainingConfig, config_to_dict
from flowjobs.runs.status import AttemptRecord, JobInfo, RunStatus, State
from tests.bench.usage import usage_of

RUNS = 10_000
LONG_AGO = (1_700_000_000, 1_700_000_000)


def make(folder: Path, number: int, state: State) -> None:
    folder.mkdir(parents=True)
    training = TrainingConfig(
        seed=number % 10, lr=1e-5 * (1 + number // 10), group=f"g{number % 7}"
    )
    config = {"name": folder.name, "signature": training.signature}
    config |= config_to_dict(RunConfig(training))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    job = {"job_id": str(number), "cluster": "slurm", "log": "", "host": "n1", "uid": os.getuid()}
    job |= {"submitted": "2025-01-01T00:00:00+00:00"}
    (folder / "jobs.jsonl").write_text(json.dumps(job) + "\n")
    status = RunStatus(state, "", 4600, 4600, 200, 200, 50, 0.88, 0)
    status.attempts = [
        AttemptRecord(
            start + 1,
            JobInfo("slurm", str(number), None, "n1", 1, restart=start),
            *("2025-01-01T00:01:00+00:00", 0, 100, "2025-01-01T01:00:00+00:00"),
            "preempted" if start < 2 else state,
        )
        for start in range(3)
    ]
    (folder / "status.json").write_text(json.dumps(dataclasses.asdict(status), indent=2))
    for file in folder.iterdir():
        os.utime(file, LONG_AGO)


@pytest.mark.bench
def test_status_of_ten_thousand_runs(study: Path) -> None:
    for number in range(RUNS):
        make(study / f"runs/run-{number:05}", number, "failed" if number % 20 == 0 else "finished")
    cold, warm = usage_of("status"), usage_of("status")
    for name, used in (("cold", cold), ("warm", warm)):
        opens = used.opened / RUNS
        print(f"\n{name} {used.cpu_s:.2f} s of CPU, {used.peak_mb:.0f} MB, {opens:.2f} opens a run")
        assert used.stdout.count("\n") > 7
        assert used.peak_mb < 300
    assert cold.cpu_s < 3
    assert warm.cpu_s < 1
    assert cold.opened <= 2 * RUNS
    assert warm.opened == 0
