"""A study of 10,000 runs: what `status` costs, in CPU, memory and files that it opens."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrainingConfig, config_to_dict
from flowjobs.runs.status import AttemptRecord, JobInfo, RunStatus, State

RUNS = 10_000
LONG_AGO = (1_700_000_000, 1_700_000_000)
# Counts the files of runs that are opened.
COUNTING = """
import sys
opened = [0]
def hook(event, arguments):
    if event == "open" and "study/runs/" in str(arguments[0]):
        opened[0] += 1
sys.addaudithook(hook)
from flowjobs.cli import main
try:
    main(["status"])
finally:
    print(*opened, file=sys.stderr)
"""


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
            life + 1,
            JobInfo("slurm", str(number), None, "n1", 1, restart=life),
            *("2025-01-01T00:01:00+00:00", 0, 100, "2025-01-01T01:00:00+00:00"),
            "preempted" if life < 2 else state,
        )
        for life in range(3)
    ]
    (folder / "status.json").write_text(json.dumps(dataclasses.asdict(status), indent=2))
    for file in folder.iterdir():
        os.utime(file, LONG_AGO)


def measured() -> tuple[float, float, int]:
    """CPU seconds, megabytes, and files opened in runs, of one `status`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", COUNTING], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") > 7
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, after.ru_maxrss / 1000, int(done.stderr.split()[-1])


@pytest.mark.bench
def test_status_of_ten_thousand_runs(study: Path) -> None:
    for number in range(RUNS):
        make(study / f"runs/run-{number:05}", number, "failed" if number % 20 == 0 else "finished")
    cold_s, cold_mb, cold_opens = measured()
    warm_s, warm_mb, warm_opens = measured()
    print(f"\ncold {cold_s:.2f} s of CPU, {cold_mb:.0f} MB, {cold_opens / RUNS:.2f} opens a run")
    print(f"warm {warm_s:.2f} s of CPU, {warm_mb:.0f} MB, {warm_opens / RUNS:.4f} opens a run")
    assert cold_s < 3
    assert warm_s < 1
    assert max(cold_mb, warm_mb) < 300
    assert cold_opens <= 2 * RUNS
    assert warm_opens == 0
