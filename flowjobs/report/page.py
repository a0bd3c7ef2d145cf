"""A comparison as one HTML page that needs nothing else: no network, and no JavaScript to read."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flowjobs import __version__
from flowjobs.report.comparison import SEED, Cell, Comparison, varying_fields
from flowjobs.report.curves import loss_charts
from flowjobs.report.origin import command_of, commit_of, wandb_page_of
from flowjobs.report.results import BEST_LOSS, Result
from flowjobs.report.text import (
    MARK,
    count_words,
    explanation,
    grid_of,
    header_of,
    number_format,
    value_words,
)

HERE = Path(__file__).parent
# A picture of a user's own may be of any size; the page is to be mailed.
LARGEST_PICTURE = 1_000_000


@dataclass(frozen=True)
class Picture:
    """Samples of one run of a cell.

    Attributes:
        title: Which cell and seed.
        run: The run's name.
        data: The file, as text.
    """

    title: str
    run: str
    data: str


@dataclass(frozen=True)
class RunLine:
    """A run, for the page.

    Attributes:
        result: The run.
        anchor: Anchor of its row in the page.
        values: Values of the fields that vary, the seed among them.
        value: The metric's; None if it has none.
        command: Submits it again; empty for one that no command line trained.
        commit: Commit of its code.
        page: Its page in W&B.
        reason: Why it failed, if it did.
    """

    result: Result
    anchor: str
    values: list[str]
    value: float | None
    command: str
    commit: str
    page: str
    reason: str


def html_page(found: Comparison, title: str, command: str) -> str:
    """The page.

    Args:
        found: What it shows.
        title: What was selected.
        command: The command line that made it.
    """
    import jinja2  # slow to load

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    varying = [*varying_fields(found.results)]
    if len({result.shown(SEED) for result in found.results}) > 1:
        varying.append(SEED)
    # By the run, not its name: two studies may have one of the same.
    lines = {
        result.run: _line(found, result, f"run{number}", varying)
        for number, result in enumerate(found.results)
    }
    form = number_format(found)
    return environment.get_template("page.html").render(
        title=title,
        command=command,
        version=__version__,
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
        found=found,
        explanation=explanation(found),
        mark=MARK,
        header=header_of(found),
        column_fields=", ".join(found.column_fields),
        grid=grid_of(found),
        value_of=lambda cell: value_words(cell, form),
        count_of=count_words,
        is_best_loss=found.metric.name == BEST_LOSS and found.metric.step is None,
        charts=loss_charts(found),
        pictures=_pictures(found),
        varying=varying,
        lines=lines,
        number=lambda value: f"{value:{form}}",
    )


def _line(found: Comparison, result: Result, anchor: str, varying: Sequence[str]) -> RunLine:
    run = result.run
    failed = result.status.state == "failed"
    return RunLine(
        result,
        anchor,
        [result.shown(name) for name in varying],
        found.metric.of(result),
        "" if result.status.was_begun_in_python else command_of(run),
        commit_of(run),
        wandb_page_of(run),
        result.status.reason if failed else "",
    )


def _pictures(found: Comparison) -> list[Picture]:
    """One of each cell: of the first of its runs that has one."""
    fields = (*found.row_fields, *found.column_fields)
    pictures = []
    for row in found.rows:
        for column in found.columns:
            values = zip(fields, (*row, *column), strict=True)
            title = ", ".join(f"{name} {value}" for name, value in values)
            if (cell := found.cells.get((row, column))) and (picture := _picture(cell, title)):
                pictures.append(picture)
    return pictures


def _picture(cell: Cell, title: str) -> Picture | None:
    for result in cell.results:
        file = result.run.samples_picture
        try:
            if file.stat().st_size <= LARGEST_PICTURE:
                data = base64.b64encode(file.read_bytes()).decode()
                seed = f"seed {result.shown(SEED)}"
                return Picture(f"{title}, {seed}" if title else seed, result.run.name, data)
        except OSError:
            continue
    return None
