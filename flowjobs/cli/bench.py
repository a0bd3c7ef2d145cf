"""flowjobs bench."""

import dataclasses
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowjobs.cli.defaults import Defaults, WithDefaults
from flowjobs.cli.json_output import print_json
from flowjobs.cli.numbers import check_seconds
from flowjobs.cli.parser import Flag
from flowjobs.cli.prepare import prepare_run
from flowjobs.config import RestartConfig, TrackingConfig, TrainingConfig, value_in_name
from flowjobs.errors import ConfigError
from flowjobs.flows.flow import FLOWS
from flowjobs.jobs.mps import CONTROL
from flowjobs.runs.datasets import pair_files
from flowjobs.runs.run import default_study
from flowjobs.runs.status import EXIT_FAILED

if TYPE_CHECKING:
    from flowjobs.jobs.side_by_side import SideBySide


@dataclass(frozen=True)
class Bench(WithDefaults):
    """Measure how many runs of a config this device trains best at once.

    On a cluster, in a job of one GPU: srun --gpus-per-node=1 flowjobs bench …
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)

    runs_per_gpu: Annotated[tuple[int, ...], tyro.conf.arg(metavar="K...")] = (1, 2, 4, 8)
    """Numbers of simultaneous runs to measure, one after another."""

    mps: Flag = False
    """Have them share the GPU by CUDA's MPS, as with `sweep --mps`."""

    seconds: float = 20.0
    """How long each is measured, once all of them train."""

    study: Path = field(default_factory=default_study)
    """Root of the study, for its data; nothing is written there."""

    json: Flag = False
    """Print JSON."""

    def run(self, defaults: Defaults) -> int:
        """Measure and print. Returns the exit code."""
        from flowjobs.jobs.side_by_side import advised, measure

        counts = sorted({*self.runs_per_gpu})
        if not counts or counts[0] < 1:
            raise ConfigError("--runs-per-gpu: expected numbers of at least 1, as 1 2 4 8")
        check_seconds("--seconds", self.seconds)
        run, config = prepare_run(
            defaults, self.study, None, self.training, None, TrackingConfig(), RestartConfig()
        )
        training = _without_pairs_to_make(config.training, run.study)
        measured: list[SideBySide] = []
        for count in counts:
            measured.append(measure(training, run.study, count, self.seconds, _say, mps=self.mps))
            if measured[-1].why:
                break  # more of them cannot either
        best = advised(measured)
        if self.json:
            rows = [dataclasses.asdict(some) for some in measured]
            print_json({"measured": rows, "advised": best.runs if best else None})
        else:
            _print(measured, best, by_turns=not self.mps)
        return 0 if best else EXIT_FAILED


def _without_pairs_to_make(training: TrainingConfig, study: Path) -> TrainingConfig:
    """The config, or one that costs the same where its pairs (`--reflow-from`) are not made yet.

    Raises:
        ConfigError: It has a flow of the user's own, which may need them.
    """
    if training.reflow_from is None or pair_files(study, training.reflow_from)[0].exists():
        return training
    not_made = f"the pairs of {value_in_name('reflow_from', training.reflow_from)} are not made yet"
    if training.flow_path in FLOWS:
        _say(f"{not_made}: icfm is measured, whose steps cost the same")
        return dataclasses.replace(training, flow="icfm", reflow_from=None)
    raise ConfigError(
        f"--flow {training.flow}: {not_made}, and without them it cannot be measured: the first "
        "run that takes them makes them, so submit one before"
    )


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _print(measured: "list[SideBySide]", best: "SideBySide | None", *, by_turns: bool) -> None:
    alone = measured[0].samples_per_s / measured[0].runs
    print(f"{'at once':>7}  {'samples/s':>12}  {'each':>12}  of {measured[0].runs} at a time")
    for some in measured:
        if some.why:
            print(f"{some.runs:7}  cannot train: {some.why}")
            continue
        each = some.samples_per_s / some.runs
        ratio = some.samples_per_s / (alone * measured[0].runs)
        print(f"{some.runs:7}  {some.samples_per_s:12,.0f}  {each:12,.0f}  {ratio:.2f}")
    if best:
        print(f"--runs-per-gpu {best.runs} trains the most, or within 5 % of it")
    if by_turns and len(measured) > 1 and shutil.which(CONTROL):
        print("They took turns on the GPU; --mps measures them as they compute at once.")
