"""Loss curves as SVG: a line a cell, the mean over its seeds, with a band of one deviation.

Drawn here, for a page of 150 KB has no room for a library of charts. Colours are the page's.
"""

import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from flowjobs.report.comparison import Cell, Comparison

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 26
MOST_POINTS = 40
# More lines than colours cannot be told apart; the others get a chart of their own.
MOST_LINES = 6
# The first epochs fall from far above and would press what counts into a line.
SHOWN_FROM = 0.02

Point = tuple[int, float, float]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: What its lines have in common.
        svg: The drawing.
        names: Names of its lines, in the order of their colours.
    """

    title: str
    svg: str
    names: list[str]


def loss_charts(found: Comparison) -> list[Chart]:
    """A chart for each column of the table, or several where it has many rows."""
    charts = []
    for column in found.columns:
        lines: dict[str, list[Point]] = {}
        for row in found.rows:
            cell = found.cells.get((row, column))
            if cell and (points := _mean_curve(cell)):
                lines[_words(found.row_fields, row) or "all runs"] = points
        names = list(lines)
        title = _words(found.column_fields, column)
        for first in range(0, len(names), MOST_LINES):
            some = {name: lines[name] for name in names[first : first + MOST_LINES]}
            charts.append(Chart(title, _svg(some, title), list(some)))
    return charts


def _words(names: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def _mean_curve(cell: Cell) -> list[Point]:
    """Step, mean and deviation, up to the last step that all seeds have; thinned out.

    Of the seeds that the table averages, or will: one that has failed would end the line and draw
    it through its own last loss, and counts where there is no other. One that has stopped early has
    its last loss for good.
    """
    results = [result for result in cell.results if result.curve]
    results = [of for of in results if of.finished or of.live] or results
    if not results:
        return []
    curves = [result.curve for result in results]
    ends = [of.curve[-1][0] for of in results if not of.finished]
    begin = max(curve[0][0] for curve in curves)
    end = min(ends, default=max(curve[-1][0] for curve in curves))
    steps = sorted({step for curve in curves for step, _ in curve if begin <= step <= end})
    if len(steps) > MOST_POINTS:
        last = len(steps) - 1
        kept = {round(index * last / (MOST_POINTS - 1)) for index in range(MOST_POINTS)}
        steps = [steps[index] for index in sorted(kept)]
    points = []
    for step in steps:
        losses = [curve[bisect_right(curve, (step, math.inf)) - 1][1] for curve in curves]
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        points.append((step, statistics.fmean(losses), deviation))
    return points


def _svg(lines: Mapping[str, Sequence[Point]], title: str) -> str:
    last = max(points[-1][0] for points in lines.values()) or 1
    shown = [
        value
        for points in lines.values()
        for step, mean, deviation in points
        if step >= SHOWN_FROM * last or len(points) < 3
        for value in (mean - deviation, mean + deviation)
    ] or [points[-1][1] for points in lines.values()]
    low, high = min(shown), max(shown)
    margin = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def place(step: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        return f"{x:.0f},{max(-HEIGHT, y):.1f}"

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"validation loss by step {title}")}">',
        f'<clipPath id="plot"><path d="M{LEFT} {TOP}H{WIDTH - RIGHT}V{HEIGHT - BOTTOM}H{LEFT}z"/>'
        "</clipPath>",
    ]
    for value in _ticks(low, high):
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        parts.append(
            f'<path class="tick" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for step in _ticks(0, last):
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        parts.append(f'<text x="{x:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{step:g}</text>')
    for index, (name, points) in enumerate(lines.items()):
        if any(deviation for _, _, deviation in points):
            upper = [place(step, mean + deviation) for step, mean, deviation in points]
            lower = [place(step, mean - deviation) for step, mean, deviation in reversed(points)]
            parts.append(f'<path class="band c{index}" d="M{"L".join([*upper, *lower])}z"/>')
        line = "L".join(place(step, mean) for step, mean, _ in points)
        parts.append(
            f'<path class="line c{index}" d="M{line}"><title>{escape(name)}</title></path>'
        )
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between two."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 6)
    return [
        round(step * count, 12)
        for count in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]
