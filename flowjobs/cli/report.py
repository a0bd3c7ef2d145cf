"""flowjobs report."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import tyro

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.json_output import print_json
from flowjobs.cli.parser import Flag
from flowjobs.cli.runs_named import RunNames, never_made, readable_runs
from flowjobs.config import OptionalPath, OptionalStr, TrainingConfig
from flowjobs.errors import ConfigError, FlowjobsError, RunNotFoundError
from flowjobs.formatting import first_of
from flowjobs.runs.run import Run, absolute, check_is_file
from flowjobs.runs.selection import fits
from flowjobs.runs.status import EXIT_BAD_INPUT

if TYPE_CHECKING:
    from flowjobs.report.comparison import Comparison
    from flowjobs.report.results import Result

Fields = Annotated[Optional[tuple[str, ...]], tyro.conf.arg(metavar="FIELD...")]  # noqa: UP045
Step = Annotated[
    Optional[Union[int, Literal["end"]]],  # noqa: UP007, UP045, see config.OptionalStr
    tyro.conf.arg(metavar="STEP|end"),
]
FORMATS = ("markdown", "csv", "latex", "json")


@dataclass(frozen=True)
class Report(InStudy):
    """Compare runs in a table: mean and standard deviation over seeds, and which is best."""

    names: Annotated[RunNames, tyro.conf.arg(metavar="[RUN...]")] = ()
    """Names, patterns, a sweep, a group, or FIELD=VALUE (flow=otcfm); default: all."""

    rows: Fields = None
    """Fields of the config whose values are the rows; default: what varies."""

    columns: Fields = None
    """The same for the columns."""

    metric: OptionalStr = None
    """What the cells hold: a measure of evaluation.json (also NAME@CALLS, of samples of so many
    network calls), best_val_loss, or a key of metrics.jsonl; default: a measure if all finished
    runs have it, else best_val_loss."""

    at_step: Step = None
    """Where losses are compared; end: those of finished runs alone; default: the last step that all
    runs have which are not failed or cancelled."""

    markdown: Flag = False
    """Print a Markdown table."""

    csv: Flag = False
    """Print CSV: a line a cell, with all digits."""

    latex: Flag = False
    """Print a LaTeX table (booktabs)."""

    json: Flag = False
    """Print JSON."""

    html: OptionalPath = None
    """Write one page with table, curves, samples and commands to this file, to be mailed."""

    def run(self, defaults: Defaults) -> int:
        """Print, or write the page. Returns the exit code."""
        from flowjobs.report import text
        from flowjobs.report.comparison import compare

        asked = [name for name in FORMATS if getattr(self, name)]
        if len(asked) > 1:
            raise ConfigError(f"found --{' and --'.join(asked)}, expected one of them")
        results, broken = self._results()
        missing = never_made(defaults, absolute(self.study), self.names, always_read=True)
        not_made = self._not_made(missing)
        found = compare(results, self.rows, self.columns, self.metric, self.at_step, not_made)
        if missing:
            note = f"of the sweep, not in the study: {first_of([*missing])}; run it again"
            found = dataclasses.replace(found, notes=[*found.notes, note])
        if self.html is not None:
            said = self._write_page(found, self.html)
            print(said, file=sys.stderr if asked else sys.stdout)
        match asked:
            case ["markdown"]:
                print(text.markdown(found), end="")
            case ["csv"]:
                print(text.as_csv(found), end="")
            case ["latex"]:
                print(text.latex(found), end="")
            case ["json"]:
                print_json(text.to_dict(found))
            case _ if self.html is None:
                _print_table(found)
        if self.html is not None or (asked and asked != ["markdown"]):
            for note in found.notes:
                print(f"note: {note}", file=sys.stderr)
        return EXIT_BAD_INPUT if broken else 0

    def _results(self) -> tuple[list[Any], bool]:
        """The runs of the report, and whether some could not be read."""
        from flowjobs.report.results import read_result

        runs, broken = readable_runs(self.study, self.names)
        results, unread = [], bool(broken)
        for run in runs:
            try:
                results.append(read_result(run))
            except FlowjobsError as error:
                print(f"error: {run.name}: {error}", file=sys.stderr)
                unread = True
        if not results:
            raise RunNotFoundError(f"there are no runs to report in {absolute(self.study)}")
        return results, unread

    def _not_made(self, missing: Mapping[str, TrainingConfig | None]) -> list["Result"]:
        """What is to be in the cells of the runs that were never made, where that is known."""
        from flowjobs.report.results import not_made

        study = absolute(self.study)
        found = [not_made(Run(study, name), config) for name, config in missing.items() if config]
        return [result for result in found if fits(result.fields, self.names)]

    def _write_page(self, found: "Comparison", file: Path) -> str:
        """Write it. Returns what was written."""
        from flowjobs.report.page import html_page
        from flowjobs.runs.files import replaced_whole

        selection = " ".join(self.names)
        title = f"{selection or absolute(self.study).name}: {found.metric.title}"
        file = absolute(file)
        check_is_file("--html", file)
        if not file.parent.is_dir():
            raise ConfigError(f"--html {file}: found no folder {file.parent}")
        page = html_page(found, title, shlex.join(["flowjobs", *sys.argv[1:]]))
        content = page.encode(errors="replace")  # a pattern may have bytes that are not UTF-8
        with replaced_whole(file, flush=False) as output:
            output.write(content)
        return f"{file}: {len(found.results)} runs, {len(content) / 1000:.0f} KB"


def _print_table(found: "Comparison") -> None:
    from rich.table import Table
    from rich.text import Text

    from flowjobs.cli.table import plain_console
    from flowjobs.report.text import (
        MARK,
        cell_words,
        explanation,
        grid_of,
        header_of,
        number_format,
    )

    console = plain_console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in header_of(found):
        table.add_column(title)
    form = number_format(found)
    for row, cells in grid_of(found):
        shown = []
        for cell in cells:
            words = cell_words(cell, form)
            marked = cell is not None and cell.marked
            text = words.replace(" (", f"{MARK} (", 1) if marked else words
            shown.append(Text(text, style="bold" if marked else ""))
        table.add_row(*map(Text, row), *shown)
    console.print(table)
    console.print(explanation(found), soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
