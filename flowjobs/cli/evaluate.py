"""flowjobs evaluate."""

import contextlib
import sys
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.evaluation_table import print_evaluation
from flowjobs.cli.json_output import print_json
from flowjobs.cli.parser import Flag
from flowjobs.cli.runs_named import RunNames, readable_runs
from flowjobs.cli.sample import SAY_EVERY_S, best_of, data_of
from flowjobs.config import OptionalInt, TrainingConfig
from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.evaluation.solver import (
    DEFAULT_STEPS,
    DEFAULT_TOLERANCE,
    EULER_STEPS,
    Method,
    Solver,
)
from flowjobs.formatting import first_of
from flowjobs.report.results import way_of
from flowjobs.runs.datasets import PAIRS
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.run import Run
from flowjobs.runs.selection import names_one_run
from flowjobs.runs.status import EXIT_BAD_INPUT, EXIT_FAILED

if TYPE_CHECKING:
    from flowjobs.evaluation.evaluate import Floors


@dataclass(frozen=True)
class Evaluate(InStudy):
    """Measure samples of runs' best checkpoints against their data, each figure with its floor.

    Every run does this at its end with at most 256 samples; here with more, and with a classifier
    (c2st). The result replaces the run's evaluation.json. All runs of one dataset are measured by
    the same rows and noise.
    """

    names: RunNames
    """Names, patterns, a sweep, a group, or FIELD=VALUE (flow=otcfm)."""

    n: Annotated[OptionalInt, tyro.conf.arg(aliases=["-n"])] = None
    """How many samples, and rows to compare with; default: as many as the validation part has (also
    that of --source), at most 2000."""

    repeats: int = 5
    """How often to measure, each time with other noise and rows."""

    solver: Method = "midpoint"
    """Solver of the ODE, of all but the curve over network calls."""

    steps: int = DEFAULT_STEPS
    """Steps from noise to data; of no effect with dopri5."""

    tolerance: float = DEFAULT_TOLERANCE
    """Error that dopri5 allows in each step, relative and absolute."""

    nfe: tuple[int, ...] = EULER_STEPS
    """Steps of Euler's for the curve over network calls, beside dopri5; none after --nfe: no
    curve."""

    seed: int = 0
    """Seed of the noise."""

    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one."""

    json: Flag = False
    """Print JSON: of a run that is named an object, of a selection a list of them."""

    def run(self, defaults: Defaults) -> int:
        """Evaluate, print and write. Returns the exit code."""
        if not self.names:
            raise ConfigError("evaluate: found no run, expected names, a sweep, or FIELD=VALUE")
        solver = Solver(self.solver, self.steps, self.tolerance)
        one = names_one_run(self.study, self.names)
        runs, broken = readable_runs(self.study, self.names)
        evaluations: list[dict[str, Any]] = []
        floors: dict[tuple[str, ...], Floors] = {}
        replaced: list[str] = []
        raised = False
        for run in runs:
            try:
                found = self._evaluated(run, solver, floors)
            except FlowjobsError as error:
                if one:
                    raise
                print(f"error: {run.name}: {error}", file=sys.stderr)
                broken.append(run)
                continue
            except (Exception, SystemExit):
                if one:
                    raise
                traceback.print_exc()  # of a model of the user's own: the others may be sound
                print(f"error: {run.name} was not measured: see above", file=sys.stderr)
                raised = True
                continue
            evaluations.append(found)
            if not self.json:
                print_evaluation(found)
            differs = _was_taken_otherwise(run, found)
            try:
                write_json(run.evaluation_file, found)
            except OSError as error:  # another's study, a full disk; it took minutes to measure
                why = error.strerror or error
                said = f"measured, but {run.evaluation_file} is not written: {why}"
                print(f"error: {run.name}: {said}", file=sys.stderr)
                broken.append(run)
                continue
            if differs:
                replaced.append(run.name)
        if replaced:
            print(
                f"{first_of(replaced)}: measured in another way before; the report compares by "
                "these values from now on: evaluate all runs that it compares alike",
                file=sys.stderr,
            )
        if self.json:
            print_json(evaluations[0] if one else evaluations)
        if raised:
            return EXIT_FAILED
        return EXIT_BAD_INPUT if broken else 0

    def _evaluated(
        self, run: Run, solver: Solver, floors: dict[tuple[str, ...], "Floors"]
    ) -> dict[str, Any]:
        with best_of(run, self.device) as trained:
            from flowjobs.evaluation.evaluate import Scope, evaluate

            scope = Scope(
                self.n,
                repeats=self.repeats,
                solver=solver,
                euler_steps=self.nfe,
                seed=self.seed,
            )
            data = data_of(run)
            key = _floors_key(run, trained.config)
            return evaluate(trained, *data, scope, _Progress(run.name), floors.setdefault(key, {}))


def _floors_key(run: Run, config: TrainingConfig) -> tuple[str, ...]:
    """What floors depend on: the content of the data, of which two studies have one name."""
    content = [
        f"{part}: {of}" for part, of in sorted(run.data().items()) if not part.startswith(PAIRS)
    ]
    where = (str(run.study), config.dataset, config.source)
    return (*(content or where), config.normalize)


def _was_taken_otherwise(run: Run, found: dict[str, Any]) -> bool:
    """Whether the evaluation that is to be replaced has another number of samples, say."""
    with contextlib.suppress(OSError, ValueError):
        return way_of(read_json(run.evaluation_file)) != way_of(found)
    return False


class _Progress:
    """Says now and then that it is still measuring."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = self._said = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._said > SAY_EVERY_S:
            self._said = now
            print(f"{self._name}: measuring for {now - self._started:.0f} s", file=sys.stderr)
