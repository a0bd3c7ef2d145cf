"""The table of runs, as wide as the terminal: no word breaks, long names lose their middle."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# A name is not cut shorter than to these; columns go first, from the one that says least.
NAME_AT_LEAST = 16
# Columns that are left out where they say nothing.
SELDOM = ("left", "tries")
DISPENSABLE = ("tries", "step", "job", "left", "best", "epoch")


class MiddleCut:
    """A name that keeps its beginning and its end where there is no room for all of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(NAME_AT_LEAST, len(self._name)), len(self._name))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept = options.max_width - 1
        name = self._name
        if len(name) > options.max_width:
            name = f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"
        yield Text(name, no_wrap=True)


def print_table(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a run; whole names where another program reads them."""
    console = Console(width=None if sys.stdout.isatty() else 1000)
    unbound = console.options.update(max_width=1000)
    every = [_cells(run) for run in runs]
    dropped = {title for title in SELDOM if all(cells[title] in ("", "0", "1") for cells in every)}
    table = _table(runs, dropped)
    for column in DISPENSABLE:
        if Measurement.get(console, unbound, table).minimum <= console.width:
            break
        dropped.add(column)
        table = _table(runs, dropped)
    console.print(table)


def _table(runs: Sequence[Mapping[str, Any]], dropped: set[str]) -> Table:
    rows = [_cells(run) for run in runs]
    shown = [title for title in rows[0] if title not in dropped]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in shown:
        table.add_column(title, no_wrap=title != "run", overflow="ellipsis")
    for cells in rows:
        table.add_row(*(cells[title] for title in shown))
    return table


def _cells(run: Mapping[str, Any]) -> dict[str, Any]:
    latest, best = run["latest"].get("val/loss"), run["best_val_loss"]
    return {
        "run": MiddleCut(run["run"]),
        "state": Text(run["state_in_words"]),
        "epoch": f"{run['epoch']}/{run['epochs'] or '?'}",
        "step": f"{run['step']}/{run['total_steps'] or '?'}",
        "val/loss": "" if latest is None else f"{latest:.4f}",
        "left": duration_words(run["left_s"]),
        "tries": str(len(run["attempts"])),
        "best": "" if best is None else f"{best:.4f}",
        "job": run["jobs"][-1]["job_id"] if run["jobs"] else "",
    }


def duration_words(seconds: float | None) -> str:
    """A duration in two units at most ("2 h 10 min"); empty for None."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
