"""The loss curves of a page: of the seeds that the table averages."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.config import RunConfig
from flowjobs.report.comparison import compare
from flowjobs.report.curves import loss_charts
from flowjobs.report.results import read_result
from flowjobs.runs.run import Run, run_names
from flowjobs.runs.status import State
from tests.report.made_up import made_run

FIVE = [1.0, 0.9, 0.8, 0.7, 0.6]


@pytest.mark.parametrize(
    ("others", "points"),
    [
        ([], 5),
        ([([5.0], "failed"), ([5.0, 4.0], "cancelled")], 5),
        # Early stopping.
        ([([1.0, 0.9, 0.95], "finished")], 5),
        ([([1.0, 0.9, 0.95], "running")], 3),
        ([([1.0, 0.9, 0.95], "running"), ([5.0], "failed")], 3),
    ],
)
def test_a_line_goes_as_far_as_the_seeds_that_count(
    study: Path, others: list[tuple[list[float], State]], points: int
) -> None:
    for seed, (losses, state) in enumerate([(FIVE, "finished"), (FIVE, "finished"), *others]):
        made_run(study, losses, state, seed=seed, epochs=5)
    assert len(drawn(study)) == points


def test_a_run_that_was_given_more_epochs_ends_the_line_until_it_has_trained_them(
    study: Path,
) -> None:
    for seed, losses in enumerate((FIVE, FIVE[:3])):
        run = made_run(study, losses, seed=seed, epochs=len(losses))
        run.create(RunConfig(replace(run.config().training, epochs=5)))
    assert len(drawn(study)) == 3


def test_a_cell_of_failed_runs_alone_has_their_line(study: Path) -> None:
    for seed in (0, 1):
        made_run(study, FIVE[: 3 + seed], "failed", seed=seed, epochs=5)
    assert len(drawn(study)) == 3


def drawn(study: Path) -> list[str]:
    """The points of the one line."""
    found = compare([read_result(Run(study, name)) for name in run_names(study)])
    (chart,) = loss_charts(found)
    (line,) = re.findall(r'class="line c0" d="M([^"]+)"', chart.svg)
    return str(line).split("L")
