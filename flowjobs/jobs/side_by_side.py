"""Measures runs side by side on this machine's device: what all of them train in a second.

They are runs as any other, by the same way, with all that these do; but of a study of their own
that is removed, and never at an end.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig, is_data_file
from flowjobs.errors import FlowjobsError
from flowjobs.jobs.exit_cause import last_error, log_tail
from flowjobs.jobs.mps import mps_daemon
from flowjobs.runs.datasets import pair_files, rows_per_step, split_files, trained_on
from flowjobs.runs.metrics import latest_values
from flowjobs.runs.run import Run
from flowjobs.slots import SLOTS

ENDLESS = 1_000_000
# torch.compile takes minutes, and eight at once take their time even to load torch.
FIRST_ROW_WITHIN_S = 900.0
WARM_UP_S = 2.0
POLL_S = 0.1
LEAVE_WITHIN_S = 10.0
# More at once must be worth it: what is within this of the most is as good.
AS_GOOD = 0.95


@dataclass(frozen=True)
class SideBySide:
    """What so many runs train together.

    Attributes:
        runs: How many.
        samples_per_s: Rows of all of them in a second; 0 where they cannot.
        why: Why they cannot.
    """

    runs: int
    samples_per_s: float
    why: str = ""


def measure(
    training: TrainingConfig,
    study: Path,
    runs: int,
    seconds: float,
    say: Callable[[str], None],
    *,
    mps: bool = False,
) -> SideBySide:
    """Train so many runs of a config at once for a while.

    Args:
        training: The config; each run has a seed of its own.
        study: Where its data are; nothing is written there.
        runs: How many.
        seconds: For how long, once all of them train.
        say: Told what is waited for.
        mps: Whether they share the GPU by CUDA's MPS.

    Raises:
        ConfigError: There is no MPS here.
    """
    with tempfile.TemporaryDirectory(prefix="flowjobs-bench-") as folder:
        _link_data(training, study, Path(folder))
        made = [_make(training, Path(folder), number) for number in range(runs)]
        daemon: AbstractContextManager[dict[str, str]] = mps_daemon() if mps else nullcontext({})
        with daemon as variables, _trained(made, variables) as processes:
            try:
                say(f"{runs} at once: starting")
                _wait(made, processes, lambda run, step: step > 0)
                time.sleep(WARM_UP_S)
                say(f"{runs} at once: training for {seconds:g} s")
                began = {run: _progress(run) for run in made}
                time.sleep(seconds)
                _wait(made, processes, lambda run, step: step > began[run][0])
                rates = [_rate(began[run], _progress(run)) * _rows_a_step(run) for run in made]
            except _CannotTrainError as error:
                return SideBySide(runs, 0.0, str(error))
    return SideBySide(runs, sum(rates))


def advised(measured: Sequence[SideBySide]) -> SideBySide | None:
    """The fewest runs at once that are as good as the best; None if none can train."""
    best = max((some.samples_per_s for some in measured), default=0.0)
    good = [some for some in measured if 0 < some.samples_per_s >= AS_GOOD * best]
    return min(good, key=lambda some: some.runs, default=None)


def _link_data(training: TrainingConfig, study: Path, there: Path) -> None:
    """Link what is trained on, a file at a time: what is not made yet is made in `there`."""
    files: list[tuple[Path, Path]] = []
    for name in (training.dataset, training.source):
        if not is_data_file(name):
            files += zip(split_files(study, name), split_files(there, name), strict=True)
    if (teacher := training.reflow_from) is not None:
        files += zip(pair_files(study, teacher), pair_files(there, teacher), strict=True)
    for file, link in dict(files).items():
        if file.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)


class _CannotTrainError(FlowjobsError):
    """One of the runs has ended."""


def _make(training: TrainingConfig, study: Path, number: int) -> Run:
    run = Run(study, f"bench-{number}")
    endless = replace(training, epochs=ENDLESS, patience=ENDLESS, seed=training.seed + number)
    run.create(RunConfig(endless, tracking=TrackingConfig(wandb_mode="disabled")))
    return run


@contextmanager
def _trained(
    runs: Sequence[Run], variables: Mapping[str, str]
) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Trains runs for as long as the block lasts."""
    environment = {**os.environ, **variables, SLOTS: str(len(runs)), "WANDB_MODE": "disabled"}
    processes = []
    try:
        for run in runs:
            with _log_of(run).open("wb") as log:
                command = [sys.executable, "-m", "flowjobs.jobs", str(run.folder)]
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield processes
    finally:
        if variables:
            # A client of MPS that is killed as it computes may leave the GPU in disorder.
            _tell_to_leave(processes)
        for process in processes:
            process.kill()  # nothing of theirs is kept
        for process in processes:
            process.wait()
        for run in runs:  # a thread of theirs may have been writing
            shutil.rmtree(run.checkpoints, ignore_errors=True)


def _tell_to_leave(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    deadline = time.monotonic() + LEAVE_WITHIN_S
    for process in processes:
        process.terminate()
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _wait(
    runs: Sequence[Run],
    processes: "Sequence[subprocess.Popen[bytes]]",
    until: Callable[[Run, int], bool],
) -> None:
    """Wait until each run has got so far."""
    deadline = time.monotonic() + FIRST_ROW_WITHIN_S
    waiting = dict(zip(runs, processes, strict=True))
    while waiting:
        for run, process in list(waiting.items()):
            if process.poll() is not None:
                raise _CannotTrainError(_why(run))
            if until(run, _progress(run)[0]):
                del waiting[run]
        if waiting and time.monotonic() > deadline:
            raise _CannotTrainError(f"no row of metrics in {FIRST_ROW_WITHIN_S:g} s")
        time.sleep(POLL_S)


def _progress(run: Run) -> tuple[int, float]:
    """The newest step that is on record, and when it was written."""
    try:
        written_at = run.metrics_file.stat().st_mtime
    except FileNotFoundError:
        return 0, 0.0
    return int(latest_values(run.metrics_file).get("step", 0)), written_at


def _rate(began: tuple[int, float], ended: tuple[int, float]) -> float:
    return (ended[0] - began[0]) / (ended[1] - began[1])


def _rows_a_step(run: Run) -> int:
    part, content = next(iter(run.data().items()))  # of the dataset; others come after it
    rows = trained_on(part, content.rows)
    return rows_per_step(run.config().training.batch_size, rows, ranks=1)


def _why(run: Run) -> str:
    return run.status().reason or last_error(log_tail(str(_log_of(run))))


def _log_of(run: Run) -> Path:
    return run.logs / "bench.log"
