"""From runs to the cells of a table: mean and deviation over seeds, and which is best.

A cell is marked only where chance does not explain that it is better: see `_marked`.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from flowjobs.config import NOT_IN_SIGNATURE, SIZE_FIELDS, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.flows.uses import has_use
from flowjobs.formatting import first_of, format_count, parse_count
from flowjobs.nearest import did_you_mean
from flowjobs.report.apart import told_apart
from flowjobs.report.metric import AtStep, Metric, choose_metric
from flowjobs.report.results import Result, way_of

# What repeats a run and is averaged over.
SEED = "seed"
# Fields that say nothing of what is compared.
LEFT_OUT = {SEED, "arch_args"} | (NOT_IN_SIGNATURE - {"dataset", "epochs", "patience"})
# The rest is in JSON and CSV.
MODELS_AT_MOST = 12
# What papers have as columns, if it varies.
AS_COLUMNS = ("dataset", "flow", "arch")
# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond, the last one is at most
# 4 % too large.
T_QUANTILES = (
    *(12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

# The values of some fields, in the order of these.
Key = tuple[str, ...]
# Those of a cell's row, and of its column.
Place = tuple[Key, Key]


@dataclass(frozen=True)
class Cell:
    """The runs of one row and column.

    Attributes:
        results: The runs that are made, by their names.
        values: By what pairs them with the runs of other cells: the seed, and what else is averaged
            over. Runs that repeat each other have one together, their mean.
        expected: How many values there are once all runs are made and have one.
        states: What the others do, in words, and how many of each; those that were never made are
            "not submitted".
        marked: Whether it is the best, or cannot be told from it.
        floor: What the measure is for real data, if that is known.
        best: The value that none is better than, where it lies between others.
    """

    results: tuple[Result, ...]
    values: Mapping[Key, float]
    expected: int
    states: Mapping[str, int]
    marked: bool = False
    floor: float | None = None
    best: float | None = None

    @property
    def mean(self) -> float | None:
        """Over the seeds that there are; None without any."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def parameters(self) -> int | None:
        """How many the model has; None where its runs differ, or it is not known."""
        return _common({result.status.parameters for result in self.results})

    @property
    def flops_per_sample(self) -> int | None:
        """Operations of a sample's forward pass; None as for `parameters`."""
        return _common({result.status.flops_per_sample for result in self.results})

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """A table.

    Attributes:
        metric: What the cells hold.
        row_fields: The fields whose values are the rows.
        column_fields: The same of the columns.
        rows: Their values.
        columns: The same.
        cells: By row and column; where no run is, there is none.
        notes: What a reader must know of it.
        results: All runs that are made, by their names.
    """

    metric: Metric
    row_fields: tuple[str, ...]
    column_fields: tuple[str, ...]
    rows: list[Key]
    columns: list[Key]
    cells: Mapping[Place, Cell]
    notes: list[str] = field(default_factory=list)
    results: tuple[Result, ...] = ()

    @property
    def has_marks(self) -> bool:
        """Whether a cell is marked."""
        return any(cell.marked for cell in self.cells.values())


def compare(
    results: Sequence[Result],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    metric: str | None = None,
    at_step: AtStep = None,
    missing: Sequence[Result] = (),
) -> Comparison:
    """The table of some runs.

    Args:
        results: The runs; at least one.
        rows: The fields of the rows; None: chosen by what varies.
        columns: The same for columns.
        metric: See `Metric.name`; None: a measure of the samples if all finished runs have it, else
            the best validation loss.
        at_step: Where validation losses are compared.
        missing: Runs of the sweeps among them that were never made.

    Raises:
        ConfigError: There is no such field or metric, or cells would average what has no common
            scale.
    """
    asked = told_apart(sorted([*results, *missing], key=lambda result: result.run.name))
    results = [result for result in asked if result.made]
    varying = varying_fields(asked)
    row_fields, column_fields = _layout(asked, varying, rows, columns)
    chosen = choose_metric(results, metric, at_step)
    members: dict[Place, list[Result]] = {}
    for result in asked:
        place = (_key(result, row_fields), _key(result, column_fields))
        members.setdefault(place, []).append(result)
    # A field that only differs between cells (the source of each dataset) is averaged by none.
    in_cells = [[result for result in some if result.made] for some in members.values()]
    averaged = [name for name in varying if any(map(_varies(name), in_cells))]
    if mixed := [name for name in averaged if name in chosen.floors]:
        raise ConfigError(
            f"{chosen.name} has another scale for each {' and '.join(mixed)}, and a cell would "
            f"average over {_values_of(results, mixed[0])}: add {mixed[0]} to --rows or --columns, "
            f"or select one ({mixed[0]}=…)"
        )
    pairing = (SEED, *averaged)
    cells = {place: _cell(some, chosen, pairing) for place, some in members.items()}
    notes = _notes(results, chosen, averaged)
    notes += _repeat_notes(results, (*row_fields, *column_fields, *pairing))
    notes += _code_notes([cell.results for cell in cells.values()])
    incomparable = _incomparable(results, chosen)
    if incomparable:
        notes.insert(0, incomparable)
    elif chosen.lower_is_better is not None:
        cells, not_compared = _with_marks(cells, chosen)
        notes += not_compared
    return Comparison(
        chosen,
        row_fields,
        column_fields,
        _in_order(asked, row_fields),
        _in_order(asked, column_fields),
        cells,
        notes,
        tuple(results),
    )


def varying_fields(results: Sequence[Result]) -> list[str]:
    """The fields that decide a result and differ between runs, in the order of the config."""
    known = [key.name for key in fields(TrainingConfig)]
    arguments = dict.fromkeys(name for result in results for name in result.arguments)
    candidates = [name for name in [*known, *arguments] if name not in LEFT_OUT]

    return [name for name in dict.fromkeys(candidates) if _varies(name)(results)]


def _varies(name: str) -> Callable[[Sequence[Result]], bool]:
    """Whether a field differs between runs."""

    def varies(results: Sequence[Result]) -> bool:
        # A width that --params has chosen differs between models of one size; and what a run has no
        # use for (ot_batch, beside icfm) it lacks.
        some = [
            r
            for r in results
            if (name != "width" or r.fields.get("params") is None) and has_use(name, r.fields.get)
        ]
        return len({result.shown(name) for result in some}) > 1

    return varies


def _layout(
    results: Sequence[Result],
    varying: Sequence[str],
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    known = {name for result in results for name in result.fields} - {"arch_args"}
    for name in (*(rows or ()), *(columns or ())):
        if name not in known:
            raise ConfigError(
                f"--rows, --columns: found {name}, expected fields of the config; these vary: "
                f"{', '.join(varying) or 'none'}{did_you_mean(name, known)}"
            )
    if both := set(rows or ()) & set(columns or ()):
        raise ConfigError(f"--rows, --columns: found {', '.join(sorted(both))} in both")
    if columns is None:
        left = [name for name in varying if name not in (rows or ())]
        usual = [name for name in AS_COLUMNS if name in left] or left
        # One field that varies makes rows: a table of one line is hard to read.
        columns = usual[:1] if rows is not None or len(left) > 1 else ()
        columns = () if rows is not None and not left else columns
    if rows is None:
        rows = [name for name in varying if name not in columns]
    return tuple(rows), tuple(columns)


def _key(result: Result, names: Sequence[str]) -> Key:
    return tuple(result.shown(name) for name in names)


def _in_order(results: Sequence[Result], names: Sequence[str]) -> list[Key]:
    """The values of the fields that there are together: numbers by size, words as they sort."""
    there = {
        _key(result, names): tuple(_rank(result.fields.get(name)) for name in names)
        for result in results
    }
    return sorted(there, key=lambda key: (there[key], key))


def _rank(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return 0, float(value), ""
    if (count := parse_count(str(value))) is not None:
        return 0, float(count), ""  # --params 500k, a dataset 10k
    return 1, 0.0, str(value)


def _cell(some: Sequence[Result], metric: Metric, pairing: Sequence[str]) -> Cell:
    values: list[tuple[Key, float]] = []
    states: Counter[str] = Counter()
    for result in some:
        value = metric.of(result)
        if value is not None and math.isfinite(value):
            values.append((_key(result, pairing), value))
        if value is None and result.finished:
            states["not evaluated" if metric.is_measure else "finished"] += 1
        elif not result.finished:
            states[result.state] += 1
    found = [result.measure(metric.name, "floor") for result in some]
    floors = [floor for floor in found if floor is not None]
    floor = statistics.fmean(floors) if metric.is_measure and floors else None
    bests = [result.measure(metric.name, "best") for result in some if metric.is_measure]
    best = next((best for best in bests if best is not None), None)
    made = tuple(result for result in some if result.made)
    expected = len({_key(result, pairing) for result in some})
    return Cell(made, _means(values), expected, states, floor=floor, best=best)


def _with_marks(cells: Mapping[Place, Cell], metric: Metric) -> tuple[dict[Place, Cell], list[str]]:
    """The cells with the best marked, among those that can be compared: of the same data.

    Returns:
        The cells, and notes that name those that were not compared with the best.
    """
    groups: dict[Key, list[Place]] = {}
    for place, cell in cells.items():
        if cell.results:
            groups.setdefault(_key(cell.results[0], metric.floors), []).append(place)
    best: set[Place] = set()
    notes: list[str] = []
    for places in groups.values():
        marked, note = _marked(
            {
                place: {
                    key: metric.badness(value, cells[place].best)
                    for key, value in cells[place].values.items()
                }
                for place in places
            }
        )
        best.update(marked)
        notes += [note] if note else []
    return {place: replace(cell, marked=place in best) for place, cell in cells.items()}, notes


def _marked(values: Mapping[Place, Mapping[Key, float]]) -> tuple[list[Place], str]:
    """The best cell and those that cannot be told from it; none where nothing can be told.

    Of values of which less is better.

    Two cells are told apart by a paired t-test (two-sided, 95 %) over the seeds that both have. One
    seed alone tells nothing of chance: a cell with one is neither best nor compared, and those that
    have fewer than two in common are not compared.

    Returns:
        The cells; and a note that names those that were not compared with the best, or "".
    """
    means = {place: statistics.fmean(of.values()) for place, of in values.items() if len(of) > 1}
    if len(means) < 2:
        return [], ""
    best = min(means, key=lambda place: means[place])
    differences = {
        place: _differences(values[best], values[place]) for place in means if place != best
    }
    within = [best]
    apart = []
    for place, of in differences.items():
        if len(of) < 2:
            apart.append(place)
        elif not _is_above_zero(of):
            within.append(place)
    if not apart:
        return within, ""
    names = [" ".join((*row, *column)) for row, column in (best, *apart)]
    note = (
        f"{first_of(names[1:])}: not compared with {names[0]} (the best mean), having fewer than "
        "two seeds in common"
    )
    return within if len(apart) < len(differences) else [], note


def _differences(one: Mapping[Key, float], other: Mapping[Key, float]) -> list[float]:
    """By how much `other` is worse, in each run or else each seed that both have."""
    if len(one.keys() & other.keys()) < 2:
        # What is averaged over beside seeds (each seed's own teacher) has other values there.
        one, other = (_means((key[:1], of[key]) for key in of) for of in (one, other))
    return [other[key] - one[key] for key in one if key in other]


def _means(values: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    """The mean of each key's values."""
    found: dict[Key, list[float]] = {}
    for key, value in values:
        found.setdefault(key, []).append(value)
    return {key: statistics.fmean(some) for key, some in found.items()}


def _is_above_zero(differences: Sequence[float]) -> bool:
    """Whether two or more differences are more above 0 than chance explains."""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    quantile = T_QUANTILES[min(len(differences) - 1, len(T_QUANTILES)) - 1]
    return statistics.fmean(differences) > quantile * error


def _incomparable(results: Sequence[Result], metric: Metric) -> str:
    """Why no two cells of the table are ranked, or ""."""
    # What is of one set of data is compared with what is of it alone.
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.shown("dataset"), []).append(result)
    if metric.is_measure:
        for some in groups.values():
            ways: dict[str, list[str]] = {}
            for result in some:
                if result.measures:
                    way = way_of(result.evaluation, metric.name)
                    ways.setdefault(way, []).append(result.run.name)
            if len(ways) > 1:
                found = "; ".join(f"{way}: {first_of(names)}" for way, names in ways.items())
                return (
                    f"{metric.title} was taken in other ways for some runs, so that nothing is "
                    "marked, and means over them mislead: `flowjobs evaluate` them alike "
                    f"({found})"
                )
        return ""
    varies = [
        name
        for name in metric.floors
        if any(len({result.shown(name) for result in some}) > 1 for some in groups.values())
    ]
    if not varies:
        return ""
    return (
        f"validation losses of another {' or '.join(varies)} have another floor: nothing is "
        "marked. Compare measures of samples: `flowjobs evaluate` the runs"
    )


def _notes(results: Sequence[Result], metric: Metric, averaged: Sequence[str]) -> list[str]:
    notes = []
    if sizes := _sizes(results):
        notes.append(f"models (parameters, FLOPs of a sample's forward pass): {sizes}")
    if averaged:
        what = ", ".join(averaged)
        notes.append(f"each cell averages over {what} too: give it to --rows or --columns")
    unfinished = sum(not result.finished for result in results)
    if metric.step is not None and unfinished:
        notes.append(
            f"{unfinished} of {len(results)} runs are not finished: all are compared at step "
            f"{metric.step}"
        )
    notes += dict.fromkeys(note for result in results if (note := result.note_of(metric.name)))
    if outdated := [result.run.name for result in results if result.finished and result.outdated]:
        notes.append(f"evaluated before they were trained further: {first_of(outdated)}")
    missing = sum(result.finished and not result.measures for result in results)
    if missing and (metric.is_measure or any(result.measures for result in results)):
        notes.append(f"{missing} finished runs are not evaluated: `flowjobs evaluate` them")
    if metric.is_measure and (floors := _floors(results, metric)):
        real = "what real data score in the samples' place"
        notes.append(f"floor: {'chance' if metric.name == 'memorization' else real}: {floors}")
    return notes


def _repeat_notes(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """That runs are alike in all of these fields, their seed among them; empty if none are."""
    found: dict[Key, list[str]] = {}
    for result in results:
        found.setdefault(_key(result, names), []).append(result.run.name)
    if not (same := [" = ".join(some) for some in found.values() if len(some) > 1]):
        return []
    return [f"runs alike in all fields count as one seed, by their mean: {first_of(same)}"]


def _code_notes(cells: Sequence[Sequence[Result]]) -> list[str]:
    """That the user edited the code between runs of one cell; empty where that is not so."""
    mixed = [results for results in cells if len({of.code for of in results if of.code}) > 1]
    if not mixed:
        return []
    found: dict[str, list[str]] = {}
    for result in itertools.chain(*mixed):
        if result.code:
            found.setdefault(result.code, []).append(result.run.name)
    which = "; ".join(f"code {digest}: {first_of(names)}" for digest, names in found.items())
    average = "a cell averages" if len(mixed) == 1 else f"{len(mixed)} cells average"
    return [f"{average} over runs of code that was edited in between ({which})"]


def _sizes(results: Sequence[Result]) -> str:
    """How large each model is: "mlp 500k 501k, 0.99M; dit 500k 507k, 7.1M"."""
    varying = varying_fields(results)
    arguments = {name for result in results for name in result.arguments}
    names = [name for name in varying if name in {"arch", "params", *SIZE_FIELDS, *arguments}]
    found: dict[str, str] = {}
    for result in results:
        if result.status.parameters is None:
            continue
        sizes = (result.status.parameters, result.status.flops_per_sample)
        words = ", ".join(format_count(size) for size in sizes if size is not None)
        label = " ".join(result.shown(name) for name in names or ["arch"])
        found.setdefault(f"{label}: {words}", label)
    shown = sorted(found, key=lambda text: (found[text], text))
    more = f"; and {len(shown) - MODELS_AT_MOST} more" if len(shown) > MODELS_AT_MOST else ""
    return "; ".join(shown[:MODELS_AT_MOST]) + more


def _common(values: set[int | None]) -> int | None:
    """The one value that all have."""
    known = values - {None}
    return known.pop() if len(known) == 1 else None


def _floors(results: Sequence[Result], metric: Metric) -> str:
    found: dict[str, list[float]] = {}
    for result in results:
        floor = result.measure(metric.name, "floor")
        if floor is not None and metric.of(result) is not None:
            found.setdefault(result.shown("dataset"), []).append(floor)
    means = {name: f"{statistics.fmean(some):.4g}" for name, some in found.items()}
    return ", ".join(f"{floor} ({name})" for name, floor in sorted(means.items()))


def _values_of(results: Sequence[Result], name: str) -> str:
    return ", ".join(sorted({result.shown(name) for result in results}))
