"""The table of runs, as wide as the terminal: no word breaks, long names lose their middle."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flowjobs.formatting import duration_words

# A name is not cut shorter than to these.
NAME_AT_LEAST = 16
# Columns that are left out where they say nothing.
SELDOM = ("speed", "left", "tries")
# Columns that go before a name is cut, and those that go where a cut one has no room either: each
# from the one that says least.
BEFORE_A_CUT = ("tries", "best", "job")
DISPENSABLE = ("step", "speed", "left", "epoch")


def print_text(text: str, *, stderr: bool = False) -> None:
    """Print a text, which a terminal gets broken at words; where another program reads, a line.

    Not for what is copied, as a command.

    Args:
        text: The text.
        stderr: Print on standard error.
    """
    is_drawn = (sys.stderr if stderr else sys.stdout).isatty()
    plain_console(soft_wrap=not is_drawn, stderr=stderr).print(text)


def plain_console(*, soft_wrap: bool = False, stderr: bool = False) -> Console:
    """A console that prints names as they stand: `data[raw]` is no style, and `:x:` no picture.

    As wide as the terminal; where another program reads, as any line.

    Args:
        soft_wrap: Leave it to the terminal to break lines.
        stderr: Print on standard error.
    """
    # Both: rich goes by neither alone where FORCE_COLOR and TERM=dumb are set.
    is_drawn = (sys.stderr if stderr else sys.stdout).isatty()
    width, height = (None, None) if is_drawn else (1000, 100)
    return Console(
        stderr=stderr,
        width=width,
        height=height,
        soft_wrap=soft_wrap,
        markup=False,
        emoji=False,
        highlight=False,
    )


def live_console(*, stderr: bool = False) -> Console:
    """A console to draw on again and again: in a terminal, and not where FORCE_COLOR is set alone.

    Args:
        stderr: Draw on standard error.
    """
    drawn = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, force_terminal=None if drawn else False)


class _CutName:
    """A name that keeps its beginning and its end where there is no room for all of it.

    Args:
        name: The name.
        own: What it has not in common with the other names.
        at_least: The width below which `own` is shown in its place.
    """

    def __init__(self, name: str, own: str, at_least: int) -> None:
        self._name, self._own, self._at_least = name, own, min(at_least, len(name))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self._at_least, len(self._name))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield Text(_cut(self._name if width >= self._at_least else self._own, width), no_wrap=True)


def _cut(name: str, width: int) -> str:
    kept = width - 1
    if len(name) <= width:
        return name
    return f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"


def _cut_names(names: Sequence[str]) -> list[_CutName]:
    """Names that can be told apart when they are cut: those of a sweep differ in their middle."""
    different, longest = len({*names}), max(map(len, names))
    widths = range(NAME_AT_LEAST, longest)
    apart = (width for width in widths if len({_cut(of, width) for of in names}) == different)
    at_least = next(apart, longest)
    shared = set.intersection(*({*name.split("-")} for name in names)) if different > 1 else set()
    own = ["-".join("…" if of in shared else of for of in name.split("-")) for name in names]
    own = [re.sub("…(-…)+", "…", name) for name in own]
    return [_CutName(*both, at_least) for both in zip(names, own, strict=True)]


def print_table(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a run; whole names where another program reads them."""
    rows = [_cells(run) for run in runs]
    seldom = [title for title in SELDOM if all(row[title] in ("", "0", "1") for row in rows)]
    for row in rows:
        for title in seldom:
            del row[title]
    print_fitting(rows, DISPENSABLE, before_a_cut=BEFORE_A_CUT)


def print_fitting(
    rows: Sequence[Mapping[str, Any]],
    dispensable: Sequence[str],
    right: Sequence[str] = (),
    before_a_cut: Sequence[str] = (),
) -> None:
    """Print rows of cells by their titles, of which the first is a name.

    Args:
        rows: At least one.
        dispensable: Columns that are left out, in this order, until the others have room, and names
            enough of it to be told apart.
        right: Columns of numbers.
        before_a_cut: Columns that are left out first, until there is room for whole names.
    """
    console = plain_console()
    unbound = console.options.update(max_width=1000)
    shown = [*rows[0]]
    names = _cut_names([row[shown[0]] for row in rows])
    rows = [{**row, shown[0]: name} for row, name in zip(rows, names, strict=True)]
    table = _table(rows, shown, right)
    for title in (*before_a_cut, *dispensable):
        needed = Measurement.get(console, unbound, table)
        if (needed.maximum if title in before_a_cut else needed.minimum) <= console.width:
            break
        shown = [other for other in shown if other != title]
        table = _table(rows, shown, right)
    console.print(table)


def _table(rows: Sequence[Mapping[str, Any]], shown: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in shown:
        justify: Literal["left", "right"] = "right" if title in right else "left"
        named = title == shown[0]
        table.add_column(title, no_wrap=not named, overflow="ellipsis", justify=justify)
    for row in rows:
        table.add_row(*(row[title] for title in shown))
    return table


def _cells(run: Mapping[str, Any]) -> dict[str, Any]:
    latest, best = run["latest"].get("val/loss"), run["best_val_loss"]
    return {
        "run": run["run"],
        "state": Text(run["state_in_words"]),
        "epoch": f"{run['epoch']}/{run['epochs'] or '?'}",
        "step": f"{run['step']}/{run['total_steps'] or '?'}",
        "val/loss": "" if latest is None else f"{latest:.4f}",
        "speed": _speed(run["steps_per_s"] if run["state"] == "running" else None),
        "left": duration_words(run["left_s"]),
        "tries": str(len(run["attempts"])),
        "best": "" if best is None else f"{best:.4f}",
        "job": run["jobs"][-1]["job_id"] if run["jobs"] else "",
    }


def _speed(steps_per_s: float | None) -> str:
    """ "12 /s", "3.5 s/step"."""
    if not steps_per_s:
        return ""
    return f"{steps_per_s:.3g} /s" if steps_per_s >= 1 else f"{1 / steps_per_s:.3g} s/step"
