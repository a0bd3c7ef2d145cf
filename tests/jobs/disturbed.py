"""A small run on the real Slurm, what a test does to its job, and what must come of it."""

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowjobs.errors import SubmissionError
from flowjobs.runs.metrics import Row, read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus
from flowjobs.slurm.controller import job_record
from flowjobs.tracking.process import close_session, pending_outcome
from flowjobs.training.checkpoint import read_checkpoint
from tests.cluster.client import CommandError
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.jobs.interruptions_table import assert_in_table
from tests.tracking import leet
from tests.tracking.backend import Backend

OPTIONS = (
    *("--arch", "tests.jobs.slow_model:SlowModel", "--flow", "icfm", "--epochs", "4"),
    *("--batch-size", "128", "--arch-args", "control=control"),
    *("--wandb-mode", "offline"),
)
REPOSITORY = Path(__file__).parents[2]
# For what takes seconds on an idle machine.
DEADLINE_S = 600.0


@dataclass
class Disturbed:
    """A run whose job a test disturbs."""

    run: Run
    job_id: str
    slurm: SlurmCluster

    def tell(self, what: str) -> None:
        """What the model does in its next step; see SlowModel."""
        Path("control").write_text(what)

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal to the process that trains, as nothing else of the job sees it."""
        os.kill(self.status().attempts[-1].job.pid, number)
        if number in (signal.SIGKILL, signal.SIGSEGV):
            self.tell("")  # a later start is on its own

    def status(self) -> RunStatus:
        return self.run.status()

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        def reached() -> bool:
            rows = list(read_rows(self.run.metrics_file))
            started = len(self.status().attempts) >= attempt
            return started and bool(rows) and rows[-1]["step"] >= step

        wait_until(reached, f"step {step} of attempt {attempt}", DEADLINE_S, self.explain)

    def wait_for_attempt(self, number: int) -> None:
        """Waits until the attempt trains, hurrying a job that waits for its BeginTime."""
        self.hurry_while(lambda: len(self.status().attempts) >= number)

    def wait_for_state(self, *states: str) -> RunStatus:
        self.hurry_while(lambda: self.status().state in states)
        return self.status()

    def hurry_while(self, reached: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
        end = time.monotonic() + timeout_s
        hurried_at = 0.0
        while not reached():
            assert time.monotonic() < end, self.explain()
            if time.monotonic() - hurried_at > 1:
                hurried_at = time.monotonic()
                hurry_all(self.slurm)
            time.sleep(0.1)

    def limit(self, minutes: int) -> None:
        """Leaves the job so many minutes, or some seconds less."""
        ran = self.slurm.job(self.job_id)["RunTime"].rpartition("-")[2]
        hours, begun, _ = map(int, ran.split(":"))
        minutes += 60 * hours + begun
        self.slurm.run("scontrol", "update", f"jobid={self.job_id}", f"timelimit={minutes}")

    def explain(self) -> str:
        queue = self.slurm.run("squeue", "-h", "-o", "%i %T %r %j")
        return f"{self.status()}\n{queue}\n{self.logs()}"

    def logs(self) -> str:
        found = {*self.run.logs.glob("*.out"), *Path.cwd().glob("*.out")}
        return "".join(path.read_text() for path in sorted(found))

    def job_ids(self) -> list[str]:
        """Of every job that was submitted for the run."""
        return [entry.job_id for entry in self.run.submissions()]

    def attempts(self) -> list[tuple[str, str]]:
        return [(attempt.state, attempt.kind) for attempt in self.status().attempts]

    def is_row(self, what: str) -> None:
        """The table of interruptions says of `what` what came of this run."""
        assert_in_table(what, self.status(), len(self.job_ids()), self.steps_lost())

    def steps_lost(self) -> int:
        """Steps that were done and had to be done again."""
        attempts = self.status().attempts
        return sum(
            (before.last_step or 0) - (after.first_step or 0)
            for before, after in itertools.pairwise(attempts)
        )


def hurry_all(slurm: SlurmCluster) -> None:
    """Starts every job soon that waits for its BeginTime."""
    for line in slurm.run("squeue", "-h", "-r", "-o", "%i|%T|%r").splitlines():
        job_id, state, reason = line.split("|")
        if (state, reason) == ("PENDING", "BeginTime"):
            with contextlib.suppress(CommandError):  # it has started meanwhile
                slurm.run("scontrol", "update", f"jobid={job_id}", "starttime=now+1")


Start = Callable[..., Disturbed]


# Where the runs of a test's jobs are tracked; None: in offline files.
server: Backend | None = None


@dataclass(frozen=True)
class Tracked:
    """A run as W&B has it, and its rows over all sessions, in order."""

    state: str
    exit_code: int | None
    tags: list[str]
    notes: str
    config: dict[str, Any]
    rows: list[Row]


def in_wandb(run: Run) -> Tracked:
    if server is not None:
        there = server.run(run.tracking_id())
        return Tracked(
            there.state, there.exit_code, there.tags, there.notes, there.config, there.rows
        )
    files = leet.session_files(run)
    if not files:
        return Tracked("", None, [], "", {}, [])
    newest = leet.inspect(files[-1])
    rows = [row for file in files for row in leet.history(file)]
    return Tracked(newest.state, newest.exit_code, newest.tags, newest.notes, newest.config, rows)


def tell_if_late(run: Run) -> None:
    """Tells W&B of the newest attempt, if that is over and has said that W&B was too late for it.

    So it may be on a busy machine. Of an attempt that has said nothing a test tells nothing.
    """
    said = f"W&B does not know that {run.name} is {run.status().state}"
    logs = [*run.logs.glob("*.out"), *Path.cwd().glob("*.out")]
    if not any(said in path.read_text() for path in logs) or not pending_outcome(run):
        return
    job = run.status().attempts[-1].job
    with contextlib.suppress(SubmissionError):
        record = job_record(job.job_id) if job.cluster == "slurm" else None
        if record is None or record.state not in ("RUNNING", "COMPLETING"):
            close_session(run)


def assert_in_wandb(run: Run, state: str, exit_code: int, reason: str = "") -> None:
    """W&B tells the run's end, and each row of metrics.jsonl once."""
    deadline = time.monotonic() + DEADLINE_S
    # A job says how it ended on disk first; and where wandb's own process died of the job's signal,
    # its session is closed as preempted before another one says why.
    while time.monotonic() < deadline:
        found = in_wandb(run)
        if found.state == state and reason in found.notes:
            break
        tell_if_late(run)
        time.sleep(0.2)
    assert (found.state, found.exit_code) == (state, exit_code), found
    assert ("failed" in found.tags) == (state == "failed")
    assert ("cancelled" in found.tags) == ("cancelled" in reason)
    assert reason in found.notes, found.notes
    told = {row["step"]: row for row in found.rows}
    assert list(told) == [row["step"] for row in found.rows], "a step is there twice"
    for row in read_rows(run.metrics_file):
        assert {key: told[row["step"]][key] for key in row} == row


def assert_equal_to(whole: Run, run: Run) -> None:
    """Weights, EMA, optimizer and metrics are the same, to the last bit, and W&B knows them."""
    if run.config().tracking.wandb_mode == "offline":
        assert_in_wandb(run, "finished", 0)
    for mine, other in ((run.last, whole.last), (run.best, whole.best)):
        found, expected = read_checkpoint(mine), read_checkpoint(other)
        for part in ("model_state_dict", "ema_shadow"):
            assert all(
                torch.equal(found[part][key], value) for key, value in expected[part].items()
            )
        assert found["step"] == expected["step"]
        assert found["scheduler_state_dict"] == expected["scheduler_state_dict"]
    assert list(read_rows(run.metrics_file)) == list(read_rows(whole.metrics_file))


def preempt_and_wait(job: Disturbed) -> None:
    """Gives the place of the job to another one, and back when it has left."""
    other = job.slurm.preempt("n1")
    job.wait_for_state("preempted")
    job.slurm.run("scancel", other)


def by_hand(
    study: Path, slurm: SlurmCluster, script: str, options: tuple[str, ...], *sbatch: str
) -> Disturbed:
    """Submits a batch script as a person would, and waits until its run trains."""
    Path("control").write_text("await 10")
    command = ("sbatch", "--parsable", *sbatch, str(REPOSITORY / "sbatch" / script), *options)
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = Disturbed(Run(study, "disturbed"), said.strip(), slurm)
    job.wait_for_step(10)
    return job


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
