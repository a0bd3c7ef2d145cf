"""A sweep on the real Slurm: what happens to its tasks, and what comes of its runs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus
from tests.cluster.slurm import SlurmCluster
from tests.conftest import Command
from tests.jobs.disturbed import REPOSITORY, assert_equal_to, hurry_all

T = TypeVar("T")

MODEL = (
    *("--arch", "tests.jobs.slow_model:SlowModel", "--arch-args", "control=control", "pause_s=0.1"),
    *("--epochs", "2", "--batch-size", "128", "--wandb-mode", "disabled"),
)
# Room for four tasks on a node.
WHERE = ("--partition", "preempt", "--mem-gb", "4")


class Runs:
    """The runs of a sweep, looked at until something is so."""

    def __init__(self, study: Path, slurm: SlurmCluster, timeout_s: float) -> None:
        self.study, self.slurm = study, slurm
        self.end = time.monotonic() + timeout_s

    def all(self) -> dict[str, RunStatus]:
        folders = sorted((self.study / "runs").iterdir())
        return {folder.name: Run.at(folder).status() for folder in folders}

    def states(self) -> Counter[str]:
        return Counter(status.state for status in self.all().values())

    def training_on(self, *nodes: str) -> tuple[str, RunStatus]:
        """A run that trains on one of the nodes and is held there, once there is one."""

        def found() -> tuple[str, RunStatus] | None:
            for name, status in self.all().items():
                newest = status.attempts[-1] if status.attempts else None
                held = newest is not None and Path(f"control-{newest.job.pid}").exists()
                if held and status.state == "running" and newest.job.host in nodes:
                    return name, status
            return None

        return self.wait(found)

    def wait(self, found: Callable[[], T | None]) -> T:
        while not (answer := found()):
            assert time.monotonic() < self.end, self.explain()
            hurry_all(self.slurm)
            time.sleep(0.2)
        return answer

    def explain(self) -> str:
        return f"{self.states()}\n{self.slurm.run('squeue', '-r')}\n{self.all()}"

    def hold(self) -> None:
        """Has the runs go no further: one that is over cannot be struck."""
        for held in Path().glob("control-*"):
            held.unlink()  # it no longer is
        Path("control").write_text("hold")

    def let_go(self) -> None:
        Path("control").unlink(missing_ok=True)

    def preempt(self, node: str) -> None:
        """Gives a node to another job, and back when the runs have left it."""
        self.training_on(node)
        other = self.slurm.preempt(node)
        self.wait(lambda: self.slurm.job(other)["JobState"] == "RUNNING")
        self.slurm.run("scancel", other)
        self.let_go()

    def lose(self, *nodes: str) -> None:
        """Lets a node die that trains, and come back."""
        self.hold()
        _, status = self.training_on(*nodes)
        node = status.attempts[-1].job.host
        self.slurm.kill_node(node)
        self.let_go()
        self.slurm.mark_down(node)
        self.slurm.start_node(node)

    def kill_one(self, *nodes: str) -> str:
        """Kills a process that trains. Returns the name of its run."""
        self.hold()
        name, status = self.training_on(*nodes)
        os.kill(status.attempts[-1].job.pid, signal.SIGKILL)
        self.let_go()
        # A node that is lost while a job of it ends has Slurm start that again.
        job_id = status.attempts[-1].job.job_id
        self.wait(lambda: self.slurm.job(job_id)["JobState"] == "FAILED")
        return name


def undisturbed(folder: Path, options: Sequence[str], name: str) -> Run:
    """The run left alone, in a study of its own."""
    command = [sys.executable, "-m", "flowjobs", "train", *options, "--name", name]
    subprocess.run([*command, "--study", str(folder)], check=True, timeout=900)
    return Run(folder, name)


@pytest.mark.parametrize(
    ("seeds", "parallel", "samples"),
    [
        pytest.param(10, 6, 2, id="20 runs", marks=pytest.mark.timeout(7200)),
        pytest.param(
            100, 16, 10, id="200 runs", marks=[pytest.mark.long, pytest.mark.timeout(7200)]
        ),
    ],
)
def test_all_that_can_finish_do_with_the_bits_of_runs_left_alone(
    seeds: int,
    parallel: int,
    samples: int,
    slurm: SlurmCluster,
    study: Path,
    flowjobs: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    runs = 2 * seeds
    sweep = ("sweep", *MODEL, "--flow", "icfm", "otcfm", "--seed", *map(str, range(seeds)))
    sweep += ("--parallel", str(parallel), "--yes", *WHERE, "--name", "grid")
    planned = flowjobs(*sweep, "--dry-run")
    assert f"new        {runs}\n" in planned.stdout, planned.stdout + planned.stderr
    assert not study.exists()
    Path("control").write_text("await 3")  # until the first are preempted
    done = flowjobs(*sweep)
    assert re.findall(r"^submitted  job \d+, (\d+) runs$", done.stdout, re.M) == [str(runs)]

    found = Runs(study, slurm, timeout_s=6000)
    found.preempt("n1")
    crashed = found.kill_one("n1", "n2", "n3", "n4")
    found.lose("n1", "n2", "n3", "n4")
    found.wait(lambda: found.states() == {"finished": runs - 1, "failed": 1})

    ends = {name: [a.kind for a in status.attempts] for name, status in found.all().items()}
    assert ends[crashed][-1] == "killed"
    assert {"preempted", "node failure"} <= {kind for kinds in ends.values() for kind in kinds}
    # Each has one folder, and one job of its own: the task of the array.
    jobs = {tuple(e.job_id for e in Run(study, name).submissions()) for name in ends}
    assert len(jobs) == runs
    assert {len(ids) for ids in jobs} == {1}

    interrupted = [name for name, kinds in ends.items() if len(kinds) > 1 and name != crashed]
    for name in interrupted[:samples]:
        training = Run(study, name).config().training
        own = (*MODEL, "--flow", training.flow, "--seed", str(training.seed))
        assert_equal_to(undisturbed(tmp_path / "alone", own, name), Run(study, name))

    again = flowjobs("sweep", "grid")
    assert again.returncode == 0, again.stderr
    assert "nothing to submit" in again.stdout
    assert f"finished   {runs - 1}\n" in again.stdout
    assert f"failed     1: 1 killed ({crashed})" in again.stdout
    assert slurm.run("squeue", "-h") == ""
