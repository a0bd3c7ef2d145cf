"""The figure in the cells of a report: which, at which step, and what it may be compared with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowjobs.errors import ConfigError
from flowjobs.flows.flow import may_couple
from flowjobs.nearest import did_you_mean
from flowjobs.report.results import AT_CALLS, BEST_LOSS, Result

# "end": of finished runs alone. None: the last step that all have which may still get further.
AtStep = int | Literal["end"] | None

# A validation loss is the variance of the target (its floor) and what the model adds: another
# coupling, noise or set of data has another floor. Samples are measured against data alone, their
# paths from the source on, in normalized units.
FLOOR_OF_LOSS = ("dataset", "source", "normalize", "flow", "sigma", "ot_batch", "reflow_from")
FLOOR_OF_MEASURE = ("dataset",)
FLOOR_OF_PATHS = ("dataset", "source", "normalize")
PATHS = ("path_energy", "npe")
# Rows and times of the training, which validation takes as they are and uniform.
ONLY_IN_TRAINING = ("aug", "aug_strength", "time_sampling", "time_mean", "time_std")


@dataclass(frozen=True)
class Metric:
    """What a cell holds.

    Attributes:
        name: `best_val_loss`, a key of metrics.jsonl, or a measure of `evaluation.json`, also as
            NAME@CALLS: of samples of so many network calls.
        is_measure: Whether it is of `evaluation.json`.
        lower_is_better: None where neither is.
        step: Where the runs are compared; None: at the end of those that are finished.
        floors: The fields of a config that must be the same where two values are compared.
    """

    name: str
    is_measure: bool
    lower_is_better: bool | None = True
    step: int | None = None
    floors: Sequence[str] = FLOOR_OF_MEASURE

    def badness(self, value: float, best: float | None) -> float:
        """By what values are ranked, less being better.

        Args:
            value: A run's.
            best: The value that none is better than, where it lies between others (chance, of a
                classifier); None if there is no such value.
        """
        if best is not None:
            return abs(value - best)
        return value if self.lower_is_better else -value

    @property
    def title(self) -> str:
        """What it is called in a table."""
        words = self.name.replace("_", " ").replace(AT_CALLS, ", network calls ")
        return words if self.step is None else f"{words} at step {self.step}"

    def of(self, result: Result) -> float | None:
        """Its value for a run; None where the run has none (yet), or failed."""
        if self.is_measure:
            return result.measure(self.name) if result.finished else None
        key = "val/best_loss" if self.name == BEST_LOSS else self.name
        if result.finished:
            if self.name == BEST_LOSS and self.step is None:
                return result.status.best_val_loss
            return result.logged(key, self.step)
        if self.step is None or not result.live:
            return None
        reached = result.rows[-1]["step"] if result.rows else 0
        return result.logged(key, self.step) if reached >= self.step else None


def choose_metric(results: Sequence[Result], name: str | None, at_step: AtStep) -> Metric:
    """The metric that is asked for, or the one by which the runs can be compared best.

    Raises:
        ConfigError: No run has it.
    """
    if name is None and at_step is None:
        name = _measure_of_all(results)
    if isinstance(at_step, int) and at_step < 1:
        raise ConfigError(f"--at-step: found {at_step}, expected at least 1, or end")
    name = BEST_LOSS if name is None else name
    measures = dict.fromkeys(measure for result in results for measure in result.measures)
    if name.partition(AT_CALLS)[0] in measures:
        if at_step not in (None, "end"):
            raise ConfigError(
                f"--at-step: {name} is measured at the end of a run; --metric {BEST_LOSS} is known "
                "at each step"
            )
        of = name.partition(AT_CALLS)[0]
        metric = Metric(
            name,
            True,
            _said(results, of, "lower_is_better"),
            floors=FLOOR_OF_PATHS if of in PATHS else FLOOR_OF_MEASURE,
        )
        if AT_CALLS in name and not any(result.measure(name) is not None for result in results):
            raise ConfigError(f"--metric: no run has {name}; see by_nfe in its evaluation.json")
        return metric
    if name != BEST_LOSS:
        logged = {key for result in results for row in result.rows for key in row}
        if name not in logged:
            known = [BEST_LOSS, *measures, *sorted(logged - {"step", "epoch"})]
            raise ConfigError(
                f"--metric: found {name or repr(name)}, expected one of {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    step = None if at_step == "end" else at_step or _common_step(results)
    floors = _floors_of_loss(results, in_training=name.startswith("train/"))
    return Metric(name, False, True if name.endswith("loss") else None, step, floors)


def _floors_of_loss(results: Iterable[Result], *, in_training: bool) -> tuple[str, ...]:
    """What a loss's floor depends on: also the batch size, where a flow pairs a batch's rows."""
    paired = any(
        result.fields.get("ot_batch") is None and may_couple(result.fields["flow"])
        for result in results
    )
    batch = ("batch_size",) if paired else ()
    return (*FLOOR_OF_LOSS, *batch, *(ONLY_IN_TRAINING if in_training else ()))


def _measure_of_all(results: Sequence[Result]) -> str | None:
    """The first measure that all finished runs have, and of which one value is better."""
    finished = [result for result in results if result.finished]
    if not finished:
        return None
    for name in finished[0].measures:
        if _said(finished, name, "lower_is_better") is None:
            continue
        if all(result.measure(name) is not None for result in finished):
            return name
    return None


def _said(results: Iterable[Result], name: str, key: str) -> Any:
    """What the first evaluation that has this measure says of it."""
    for result in results:
        if name in result.measures:
            found = result.evaluation["measures"][name]
            return found.get(key) if isinstance(found, dict) else None
    return None


def _common_step(results: Sequence[Result]) -> int | None:
    """The last step with a validation loss that all runs have, but for those without any.

    None if all are at their end. One that ended early has its last loss for good.
    """
    live = (result.curve[-1][0] for result in results if result.live and result.curve)
    return min(live, default=None)
