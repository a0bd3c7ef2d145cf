"""A comparison as text: cells in words, and the table as Markdown, CSV, LaTeX and JSON."""

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from flowjobs.report.comparison import Cell, Comparison

MOST_DECIMALS = 6
# Values below are written with an exponent where they need more decimals.
TINY = 0.01
MARK = "*"
EXPONENT = re.compile(r"e([+-]\d+)")

LATEX_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        # At the begin of a row they would be an argument of the \\ or the \midrule before.
        **{character: f"{{{character}}}" for character in "[*"},
        # In LaTeX's own encoding of fonts these are other characters.
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


def number_format(found: Comparison) -> str:
    """How the values of a table are written, all alike: ".3f", or ".2e" where they are tiny.

    Two digits of a typical deviation say as much as is known. One run that diverges is not typical,
    so that a cell of small values has as many as it needs.
    """
    cells = found.cells.values()
    deviations = [cell.deviation for cell in cells if cell.deviation]
    means = [abs(cell.mean) for cell in cells if cell.mean]
    if deviations:
        size = max(_decimals(statistics.median(deviations)), *map(_needed_decimals, cells))
    elif means:
        size = _decimals(min(means), digits=4)
    else:
        return ".0f"
    largest = max(means, default=0.0)
    if size <= MOST_DECIMALS or largest >= TINY or not largest:
        return f".{max(0, min(MOST_DECIMALS, size))}f"
    digits = size + math.floor(math.log10(largest))
    return f".{max(2, min(MOST_DECIMALS, digits))}e"


def _decimals(value: float, digits: int = 2) -> int:
    """How many show so many digits of a value; negative of a large one."""
    return digits - 1 - math.floor(math.log10(value))


def _needed_decimals(cell: Cell) -> int:
    """How many show two digits of a cell's deviation, but no more than four of its mean."""
    if not cell.mean:
        return 0
    if not cell.deviation:  # one value alone may be near 0 by chance
        return min(_decimals(abs(cell.mean), digits=3), 3)
    return min(_decimals(cell.deviation), _decimals(abs(cell.mean), digits=4))


def value_words(cell: Cell, form: str, between: str = " ± ") -> str:
    """Mean and deviation; empty without a value."""
    if cell.mean is None:
        return ""
    if cell.deviation is None:
        return f"{cell.mean:{form}}"
    return f"{cell.mean:{form}}{between}{cell.deviation:{form}}"


def count_words(cell: Cell) -> str:
    """How many seeds a value is of, and what the other runs do."""
    n = len(cell.values)
    parts = [f"n={n}" if n == cell.expected else f"{n}/{cell.expected} seeds"] if n else []
    parts += [f"{many} {state}" for state, many in sorted(cell.states.items())]
    return ", ".join(parts)


def cell_words(cell: Cell | None, form: str) -> str:
    """All of a cell on one line."""
    if cell is None:
        return ""
    value, count = value_words(cell, form), count_words(cell)
    return f"{value} ({count})" if value else count


def explanation(found: Comparison) -> str:
    """What stands in the cells, as a sentence."""
    text = f"{found.metric.title}: mean ± standard deviation over n seeds"
    better = {True: "lower is better", False: "higher is better", None: ""}
    words = better[found.metric.lower_is_better]
    bests = {f"{cell.best:.3g}" for cell in found.cells.values() if cell.best is not None}
    if bests:  # of several sets of data each has its own
        words = f"the nearer to {' or '.join(sorted(bests))} the better"
    if words:
        text += f"; {words}"
    if found.has_marks:
        text += (
            f"; {MARK} the best, and what a paired t-test over common seeds (95 %) cannot tell "
            "from it"
        )
    return text


def header_of(found: Comparison) -> list[str]:
    """The titles of the columns: the fields of the rows, then the values of the columns."""
    names = [", ".join(key) for key in found.columns]
    if not found.column_fields:
        names = [found.metric.title]
    return [*found.row_fields, *names]


def grid_of(found: Comparison) -> list[tuple[Sequence[str], list[Cell | None]]]:
    """The lines of the table: the values of the row's fields, and its cells."""
    return [
        (row, [found.cells.get((row, column)) for column in found.columns]) for row in found.rows
    ]


def markdown(found: Comparison) -> str:
    """A table of GitHub's Markdown, with what a reader must know under it."""
    form = number_format(found)
    header = header_of(found)
    lines = [_markdown_row(header), _markdown_row(["---"] * len(header))]
    for row, cells in grid_of(found):
        words = [cell_words(cell, form) for cell in cells]
        marked = [
            f"**{text}**" if cell and cell.marked else text
            for text, cell in zip(words, cells, strict=True)
        ]
        lines.append(_markdown_row([*row, *marked]))
    caption = explanation(found).replace(f"; {MARK} the best", "; in bold the best")
    return "\n".join([*lines, "", caption, *(f"\n{note}" for note in found.notes)]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(found: Comparison) -> str:
    """A line a cell, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = [*found.row_fields, *found.column_fields]
    writer.writerow(
        [
            *(*fields, "metric", "step", "mean", "std", "floor", "n", "expected", "best", "others"),
            *("parameters", "flops_per_sample", "runs"),
        ]
    )
    for cell in to_dict(found)["cells"]:
        writer.writerow(
            [
                *(cell["fields"][name] for name in fields),
                found.metric.name,
                found.metric.step,
                *(cell[key] for key in ("mean", "std", "floor", "n", "expected")),
                int(cell["best"]),
                " ".join(f"{state}:{many}" for state, many in cell["others"].items()),
                *(cell[key] for key in ("parameters", "flops_per_sample")),
                " ".join(cell["runs"]),
            ]
        )
    return text.getvalue()


def latex(found: Comparison) -> str:
    """A table of the booktabs package, to be put into a paper."""
    form = number_format(found)
    header = header_of(found)
    lines = [f"% {line}" for line in (explanation(found), *found.notes)]
    lines += ["% needs \\usepackage{booktabs}"]
    lines.append("\\begin{tabular}{" + "l" * len(found.row_fields) + "c" * len(found.columns) + "}")
    lines += ["\\toprule", " & ".join(map(latex_escaped, header)) + " \\\\", "\\midrule"]
    for row, cells in grid_of(found):
        words = [*map(latex_escaped, row), *(_latex_cell(cell, form) for cell in cells)]
        lines.append(" & ".join(words) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex_cell(cell: Cell | None, form: str) -> str:
    if cell is None:
        return ""
    value, count = value_words(cell, form, between=" \\pm "), count_words(cell)
    value = EXPONENT.sub(lambda found: rf" \times 10^{{{int(found[1])}}}", value)
    if not value:
        return latex_escaped(count)
    shown = f"$\\mathbf{{{value}}}$" if cell.marked else f"${value}$"
    whole = len(cell.values) == cell.expected and not cell.states
    return shown if whole else f"{shown} {{\\small ({latex_escaped(count)})}}"


def latex_escaped(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return text.translate(LATEX_ESCAPES)


def to_dict(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON's types: `metric`, `rows`, `columns`, `cells`, `notes`."""
    fields = (*found.row_fields, *found.column_fields)
    return {
        "metric": found.metric.name,
        "lower_is_better": found.metric.lower_is_better,
        "step": found.metric.step,
        "rows": list(found.row_fields),
        "columns": list(found.column_fields),
        "cells": [
            {
                "fields": dict(zip(fields, (*row, *column), strict=True)),
                "mean": cell.mean,
                "std": cell.deviation,
                "n": len(cell.values),
                "expected": cell.expected,
                "best": cell.marked,
                "floor": cell.floor,
                "parameters": cell.parameters,
                "flops_per_sample": cell.flops_per_sample,
                "others": dict(cell.states),
                "runs": [result.run.name for result in cell.results],
            }
            for row in found.rows
            for column in found.columns
            if (cell := found.cells.get((row, column)))
        ],
        "notes": list(found.notes),
    }
