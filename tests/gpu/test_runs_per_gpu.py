"""What runs that share one GPU train together, against one of them, and what `bench` advises."""

import importlib.util
import statistics
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.jobs.side_by_side import AS_GOOD, SideBySide, advised, measure

pytestmark = [pytest.mark.gpu, pytest.mark.bench, pytest.mark.timeout(400)]

SECONDS = 4.0
SAMPLE_EVERY_S = 0.1


class BusyShare:
    """The share of time that kernels run on the GPU while a run is measured, by its driver."""

    def __init__(self) -> None:
        self._shares: list[float] = []
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def say(self, what: str) -> None:
        """What `measure` is told of: the sampling begins as the run is measured."""
        print(what, flush=True)
        if "training for" in what:
            self._thread.start()

    def mean(self) -> float | None:
        """None where the driver does not say it, or no run was measured."""
        if self._thread.ident is not None:
            self._thread.join()
        return statistics.fmean(self._shares) if self._shares else None

    def _sample(self) -> None:
        ends = time.monotonic() + SECONDS
        with _utilization() as percent:
            while time.monotonic() < ends:
                if (found := percent()) is None:
                    return
                self._shares.append(found / 100)
                time.sleep(SAMPLE_EVERY_S)


@contextmanager
def _utilization() -> Iterator[Callable[[], float | None]]:
    """What tells the percentage of the last moments in which a kernel ran; None: unknown."""
    if importlib.util.find_spec("pynvml") is None:
        yield _by_nvidia_smi
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its other name
        import pynvml

    def percent() -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        except pynvml.NVMLError as error:
            print(f"NVML: {error}")
            return None

    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError as error:
        print(f"NVML: {error}")
        yield _by_nvidia_smi
        return
    try:
        yield percent
    finally:
        pynvml.nvmlShutdown()


def _by_nvidia_smi() -> float | None:
    command = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu"]
    try:
        said = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
        return float(said)
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # it says "[N/A]", say
        print(f"nvidia-smi: {error}")
        return None


@dataclass(frozen=True)
class Measured:
    """One run of a config, so many of them by each mode, and how long one keeps the GPU busy."""

    one: SideBySide
    busy: float | None
    in_turns: list[SideBySide]
    by_mps: list[SideBySide]


def measured(
    training: TrainingConfig, study: Path, in_turns: Sequence[int], by_mps: Sequence[int] = ()
) -> Measured:
    share = BusyShare()
    began = time.monotonic()
    one = measure(training, study, 1, SECONDS, share.say)
    busy = share.mean()
    found = Measured(
        one,
        busy,
        [one, *(measure(training, study, runs, SECONDS, print) for runs in in_turns)],
        list(_by_mps(training, study, by_mps)),
    )
    kept = "unknown" if busy is None else f"{busy:.2f} of the time"
    print(f"\none run keeps {torch.cuda.get_device_name()} busy: {kept}")
    for mode, some in (("in turns", found.in_turns), ("by MPS", found.by_mps)):
        for each in some:
            ratio = each.samples_per_s / one.samples_per_s if one.samples_per_s else 0.0
            print(
                f"{each.runs} {mode}: {each.samples_per_s:,.0f} samples/s, {ratio:.2f} {each.why}"
            )
    print(f"in {time.monotonic() - began:.0f} s")
    return found


def _by_mps(training: TrainingConfig, study: Path, counts: Sequence[int]) -> Iterator[SideBySide]:
    for runs in counts:
        try:
            yield measure(training, study, runs, SECONDS, print, mps=True)
        except ConfigError as error:
            print(error)
            return


def check(found: Measured) -> None:
    """So many train what the GPU's idle time allows; and the advice is the fewest for the most."""
    every = [*found.in_turns, *found.by_mps]
    assert [each.why for each in every if each.why] == []
    for mode in (found.in_turns, [found.one, *found.by_mps]):
        advice = advised(mode)
        most = max(each.samples_per_s for each in mode)
        assert advice is not None
        assert advice.samples_per_s >= AS_GOOD * most
        fewer = [each for each in mode if each.runs < advice.runs]
        assert all(each.samples_per_s < AS_GOOD * most for each in fewer)
        print(f"advised: --runs-per-gpu {advice.runs}")
    if found.busy is None:
        pytest.skip("how long one run keeps the GPU busy is not said here")
    for runs in {each.runs for each in every if each.runs > 1}:
        best = max(each.samples_per_s for each in every if each.runs == runs)
        bound = min(0.8 * runs, 0.9 / max(found.busy, 0.01))
        print(f"{runs} at once: {best / found.one.samples_per_s:.2f} of one, bound {bound:.2f}")
        assert best >= bound * found.one.samples_per_s, f"{runs} at once"


def test_small_runs_that_share_a_gpu_train_more_than_one(study: Path) -> None:
    check(measured(TrainingConfig(), study, in_turns=(2, 4, 8), by_mps=(2, 4, 8)))


def test_wide_runs_that_share_a_gpu_train_as_much_as_one(study: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.pt"
    # In epochs of a hundred steps, so that what an epoch's end costs is as in real runs.
    torch.save(torch.randn(32_768, 1024, generator=torch.Generator().manual_seed(0)), rows)
    training = TrainingConfig(dataset=str(rows), width=1024, batch_size=256)
    check(measured(training, study, in_turns=(2,), by_mps=(2,)))
