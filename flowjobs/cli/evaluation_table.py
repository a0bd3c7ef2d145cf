"""How an evaluation is shown: beside each measure what two parts of the data score."""

from collections.abc import Mapping
from typing import Any

from flowjobs.runs.files import read_json
from flowjobs.runs.run import Run

# The measures in the last lines of a run.
FIRST_OF_ALL = ("sliced_wasserstein", "coverage", "memorization")

SMALL = 0.01


def in_a_line(run: Run) -> str:
    """The first measures of a run, each with what real data score; empty if it is not evaluated."""
    try:
        found = read_json(run.evaluation_file)
        if run.is_outdated(found):
            return ""
        measures = found["measures"]
        shown = [
            f"{name.replace('_', ' ')} {_short(measures[name]['value'])} "
            f"({_short(measures[name]['floor'])})"
            for name in FIRST_OF_ALL
        ]
        return ", ".join(shown).replace("(", "(real data ", 1)
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _short(value: float) -> str:
    """Three decimals; of data in small units, three digits."""
    return f"{value:.3f}" if value == 0 or abs(value) >= SMALL else f"{value:.3g}"


def print_evaluation(found: Mapping[str, Any]) -> None:
    """Print the measures of a run, and how the first of them change with the network calls."""
    from rich.table import Table

    from flowjobs.cli.table import plain_console

    console = plain_console(soft_wrap=True)
    console.print(
        f"{found['name']}, step {found['step']}: {found['n']} samples ({found['solver']}, "
        f"{found['nfe']:g} network calls) against {found['n']} validation rows, "
        f"{found['repeats']} repeats",
    )
    table = Table("measure", "samples", "floor", "better", box=None)
    for name, of in found["measures"].items():
        spread = "" if of["std"] is None else f" ± {of['std']:.2g}"
        better = {True: "lower", False: "higher", None: "near the floor"}[of["lower_is_better"]]
        if of["best"] is not None:
            better = f"near {of['best']:.3g}"
        table.add_row(name, f"{of['value']:.4g}{spread}", f"{of['floor']:.4g}", better)
    console.print(table)
    noted: dict[str, list[str]] = {}
    for name, of in found["measures"].items():
        noted.setdefault(of["note"] or "", []).append(name)
    noted.pop("", None)
    for note, names in noted.items():
        console.print(f"{', '.join(names)}: {note}")
    curve = found["by_nfe"]
    names = list(next(iter(curve.values()), {}))
    table = Table("network calls", *names, box=None)
    for calls, values in curve.items():
        shown = f"dopri5: {found['nfe_of_dopri5']:g}" if calls == "dopri5" else calls
        table.add_row(shown, *(f"{values[name]:.3g}" for name in names))
    console.print(table)
    console.print("floor: what as many training rows score in the samples' place")
