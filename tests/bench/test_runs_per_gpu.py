"""What small runs train together on the cores here, against one at a time."""

import os
from pathlib import Path

import pytest

from flowjobs.config import TrainingConfig
from flowjobs.jobs.side_by_side import measure

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]


def test_runs_that_share_the_cores_train_more_than_one(study: Path) -> None:
    training = TrainingConfig()
    totals = {n: measure(training, study, n, 20.0, print).samples_per_s for n in (1, 2, 4)}
    ratios = {n: total / totals[1] for n, total in totals.items()}
    cores = len(os.sched_getaffinity(0))
    for n, total in totals.items():
        print(f"{n} at once on {cores} cores: {total:,.0f} samples/s, {ratios[n]:.2f} of one")
    if cores > 1:
        assert ratios[2] > 1.3
        assert ratios[4] > 1.3
