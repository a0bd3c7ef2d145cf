"""Submitting a thousand runs, against one sbatch of an array and a loop of `submit`; and deciding
what of ten thousand there is already.
"""

import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrainingConfig, config_to_dict
from flowjobs.runs.files import write_json
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus
from tests.bench.usage import usage_of
from tests.cluster.slurm import SlurmCluster
from tests.conftest import Command

pytestmark = pytest.mark.bench

RUNS = 1000
ROUNDS = 5
HELD = ("--wandb-mode", "disabled", "--sbatch", "hold=True")


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def test_a_thousand_runs_are_submitted_as_fast_as_an_array_by_hand_and_two_seconds(
    slurm: SlurmCluster, study: Path, flowjobs: Command
) -> None:
    by_hand = ("sbatch", "--hold", f"--array=0-{RUNS - 1}", "--output=/dev/null", "--wrap=true")
    seeds = ("--seed", *map(str, range(RUNS)))

    def sweep() -> None:
        done = flowjobs("sweep", *seeds, *HELD, "--yes")
        assert f"{RUNS} runs" in done.stdout, done.stderr

    ratios, loops = [], []
    for number in range(ROUNDS):
        raw_s = seconds(lambda: subprocess.run(by_hand, check=True, stdout=subprocess.DEVNULL))
        sweep_s = seconds(sweep)
        name = f"one-{number}"
        submit_s = seconds(lambda name=name: flowjobs("submit", *HELD, "--name", name))
        ratios.append(sweep_s / (raw_s + 1.0))
        loops.append(submit_s / (sweep_s / RUNS))
        print(f"\nsbatch {raw_s:.3f} s, sweep {sweep_s:.2f} s, one submit {submit_s:.2f} s")
        slurm.cancel_all()
        # Not removed: some file systems make folders slowly for a while after thousands have gone.
        study.rename(study.with_name(f"study-{number}"))
    print(f"{RUNS} runs: {statistics.median(ratios):.2f} times one sbatch and a second")
    print(f"a loop of submit takes {statistics.median(loops):.0f} times as long a run")
    assert statistics.median(ratios) <= 3
    assert statistics.median(loops) >= 50


def test_what_there_is_of_ten_thousand_runs_is_decided_in_a_second(
    study: Path,
) -> None:
    count = 10_000
    status = RunStatus(state="finished", epoch=200, epochs=200, patience=50)
    for seed in range(count):
        run = Run(study, f"mlp-icfm-digits-none-seed{seed}")
        run.folder.mkdir(parents=True)
        write_json(
            run.config_file, config_to_dict(RunConfig(TrainingConfig(seed=seed))), flush=False
        )
        status.write(run.status_file, flush=False)
    (study / "sweeps").mkdir()
    (study / "sweeps/all.toml").write_text(f"[grid]\nseed = {[*range(count)]}\n")
    for _ in range(3):
        used = usage_of("sweep", "all", "--cluster", "local", "--dry-run")
        assert f"finished   {count}" in used.stdout
        print(f"\n{count} runs: {used.cpu_s:.2f} s of CPU, {used.peak_mb:.0f} MB")
    assert used.cpu_s < 3
    assert used.peak_mb < 300
