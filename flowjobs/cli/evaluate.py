"""flowjobs evaluate."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.evaluation_table import print_evaluation
from flowjobs.cli.prepare import RunName, existing_run
from flowjobs.cli.sample import SAY_EVERY_S, best_of
from flowjobs.config import OptionalInt
from flowjobs.evaluation.solver import DEFAULT_STEPS, DEFAULT_TOLERANCE, Method, Solver
from flowjobs.runs.files import write_json
from flowjobs.runs.run import default_study


@dataclass(frozen=True)
class Evaluate:
    """Measure samples of a run's best checkpoint against its data, each figure with its floor.

    Every run does this at its end with at most 256 samples; here with more, and with a classifier
    (c2st). The result replaces the run's evaluation.json.
    """

    name: RunName
    """Name of the run."""

    n: Annotated[OptionalInt, tyro.conf.arg(aliases=["-n"])] = None
    """How many samples, and rows to compare with; default: as many as the validation part has, at
    most 2000."""

    repeats: int = 5
    """With other noise and other rows."""

    solver: Method = "midpoint"
    """Solver of the ODE, of all but the curve over network calls."""

    steps: int = DEFAULT_STEPS
    """Steps from noise to data; of no effect with dopri5."""

    tolerance: float = DEFAULT_TOLERANCE
    """Error that dopri5 allows in each step, relative and absolute."""

    seed: int = 0
    """Seed of the noise."""

    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one."""

    json: bool = False
    """Print JSON."""

    study: Path = field(default_factory=default_study)
    """Root of the study."""

    def run(self, defaults: Defaults) -> int:
        """Evaluate, print and write. Returns the exit code."""
        solver = Solver(self.solver, self.steps, self.tolerance)
        run = existing_run(self.study, self.name)
        with best_of(run, self.device) as trained:
            from flowjobs.data.dataset import load_datasets
            from flowjobs.evaluation.evaluate import Scope, evaluate

            scope = Scope(self.n, repeats=self.repeats, solver=solver, seed=self.seed)
            data = load_datasets(trained.config.dataset, run.study)
            found = evaluate(trained, *data, scope, _Voice())
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            print_evaluation(found)
        write_json(run.evaluation_file, found)
        return 0


class _Voice:
    """Says now and then that it is still measuring."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._said > SAY_EVERY_S:
            self._said = now
            print(f"measuring for {now - self._started:.0f} s", file=sys.stderr)
