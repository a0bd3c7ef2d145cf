"""Two papers' two-dimensional tables, from a sweep's file each, by `evaluate` and `report`.

What differs from Tong et al. (table 2; code of their runner): 300 epochs of batches of 256 for
1,000 of 512, a cosine decay of the learning rate, clipped gradients, averaged weights (EMA, 0.999),
the best of every epoch's validation over 10,000 points for every tenth over 1,000; and 10,000
samples against 10,000 points that no method has seen, by the same noise for all, for 1,000 of each
run's own. Their normalized path energy is |PE - W2²| / W2² as well, with W2² between source and
target. From Cheng and Schwing (figure 1, unconditional): 8,000 steps for 20,000, five seeds for
ten, AdamW for Adam, averaged weights; what they call W2 is its square.

The whole tables take two hours on two cores. FLOWJOBS_PAPERS=DIR keeps their study: what is
finished and measured there is not done again.

    pytest -m long -s tests/papers
"""

import json
import math
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
KEPT = os.environ.get("FLOWJOBS_PAPERS")  # read here: no test sees such variables
SAMPLES = 10_000
ON_THIS_MACHINE = ("--cluster", "local", "--wandb-mode", "disabled", "--yes")

# Mean and deviation over seeds, as printed.
Cells = dict[tuple[str, str], tuple[float, float]]
TONG_W2: Cells = {
    ("otcfm", "8gaussians"): (1.262, 0.348),
    ("icfm", "8gaussians"): (1.284, 0.384),
    ("fm", "8gaussians"): (1.062, 0.196),
    ("otcfm", "8gaussians-tong"): (1.923, 0.391),
    ("icfm", "8gaussians-tong"): (1.977, 0.266),
    ("otcfm", "moons"): (0.239, 0.048),
    ("icfm", "moons"): (0.338, 0.109),
    ("fm", "moons"): (0.246, 0.077),
    ("otcfm", "scurve"): (0.264, 0.093),
    ("icfm", "scurve"): (0.333, 0.060),
    ("fm", "scurve"): (0.377, 0.099),
}
TONG_NPE: Cells = {
    ("otcfm", "8gaussians"): (0.018, 0.014),
    ("icfm", "8gaussians"): (0.222, 0.032),
    ("fm", "8gaussians"): (0.174, 0.035),
    ("otcfm", "8gaussians-tong"): (0.053, 0.035),
    ("icfm", "8gaussians-tong"): (2.738, 0.181),
    ("otcfm", "moons"): (0.087, 0.061),
    ("icfm", "moons"): (0.841, 0.148),
    ("fm", "moons"): (0.778, 0.144),
    ("otcfm", "scurve"): (0.027, 0.026),
    ("icfm", "scurve"): (0.867, 0.117),
    ("fm", "scurve"): (0.772, 0.080),
}
C2OT_W2 = {  # roots of what they print
    "wasserstein2@1": {"icfm": (6.232, 0.186), "otcfm": (0.072, 0.025)},
    "wasserstein2@dopri5": {"icfm": (0.120, 0.045), "otcfm": (0.050, 0.040)},
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def reported(flowjobs: Command, selection: str, metric: str, *options: str) -> Cells:
    """The cells of `flowjobs report`, by flow and dataset."""
    rows = ("--rows", "flow", "--columns", "dataset", "--metric", metric)
    done = flowjobs("report", selection, *rows, "--json", *options)
    assert done.returncode == 0, done.stderr
    cells: list[dict[str, Any]] = json.loads(done.stdout)["cells"]
    return {
        (cell["fields"]["flow"], cell["fields"]["dataset"]): (cell["mean"], cell["std"])
        for cell in cells
    }


def floors(study: Path, metric: str) -> dict[str, float]:
    """What the data score in the samples' place, by dataset."""
    found = {}
    for file in study.glob("runs/*/evaluation.json"):
        config = json.loads((file.parent / "config.json").read_text())
        measured = json.loads(file.read_text())["measures"]
        found[config["training"]["dataset"]] = measured[metric]["floor"]
    return found


def compare(title: str, ours: Cells, theirs: Cells, floor: dict[str, float]) -> None:
    """Print both, and hold the order where their gap is larger than their deviations."""
    print(f"\n{title:34}{'ours':>18}{'floor':>8}{'theirs':>18}")
    for (flow, dataset), (mean, std) in theirs.items():
        own = "{:.3f} ± {:.3f}".format(*ours[flow, dataset])
        print(f"{flow:8}{dataset:26}{own:>18}{floor[dataset]:8.3f}{mean:10.3f} ± {std:.3f}")
    for one, other in combinations(theirs, 2):
        gap = theirs[one][0] - theirs[other][0]
        if one[1] == other[1] and abs(gap) > theirs[one][1] + theirs[other][1]:
            found = ours[one][0] - ours[other][0]
            assert math.copysign(1, found) == math.copysign(1, gap), (title, one, other)


def test_straight_paths_by_optimal_transport_in_short(flowjobs: Command, study: Path) -> None:
    short = ("--flow", "icfm", "otcfm", "--seed", "42", "--epochs", "12", "--parallel", "2")
    only = ("--dataset", "moons", "--source", "normal")
    done = flowjobs("sweep", str(HERE / "tong.toml"), *only, *short, *ON_THIS_MACHINE)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = flowjobs("evaluate", "tong", "-n", "1000", "--repeats", "1", "--nfe")
    assert measured.returncode == 0, measured.stderr
    npe = reported(flowjobs, "tong", "npe")
    assert npe["otcfm", "moons"][0] < 0.3 < npe["icfm", "moons"][0]
    w2, floor = reported(flowjobs, "tong", "wasserstein2"), floors(study, "wasserstein2")
    assert all(mean < 3 * floor["moons"] for mean, _ in w2.values())


@pytest.fixture
def kept(study: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study of the whole tables."""
    found = Path(KEPT).absolute() if KEPT else study
    monkeypatch.setenv("FLOWJOBS_STUDY", str(found))
    return found


def is_measured(run: Path) -> bool:
    """By the same samples, when its study was kept."""
    file = run / "evaluation.json"
    return file.exists() and json.loads(file.read_text())["n"] == SAMPLES


def trained_and_measured(flowjobs: Command, study: Path, name: str, *options: str) -> None:
    hours = 4 * 3600
    done = flowjobs("sweep", str(HERE / f"{name}.toml"), *ON_THIS_MACHINE, timeout_s=hours)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = (study / f"sweeps/{name}.runs").read_text().split()
    if not all(is_measured(study / "runs" / run) for run in runs):
        once = ("-n", str(SAMPLES), "--repeats", "1")
        measured = flowjobs("evaluate", name, *once, *options, timeout_s=hours)
        assert measured.returncode == 0, measured.stderr


@pytest.mark.long
@pytest.mark.timeout(8 * 3600)
def test_the_table_of_tong_et_al(flowjobs: Command, kept: Path) -> None:
    trained_and_measured(flowjobs, kept, "tong", "--solver", "euler", "--steps", "100", "--nfe")
    for metric, theirs in (("npe", TONG_NPE), ("wasserstein2", TONG_W2)):
        ours = reported(flowjobs, "tong", metric)
        compare(f"Tong et al., {metric}", ours, theirs, floors(kept, metric))


@pytest.mark.long
@pytest.mark.timeout(8 * 3600)
def test_the_figure_of_cheng_and_schwing(flowjobs: Command, kept: Path) -> None:
    trained_and_measured(flowjobs, kept, "c2ot", "--nfe", "1")
    squared: Callable[[Cells], Cells] = lambda cells: {  # noqa: E731
        key: (mean**2, 2 * mean * std) for key, (mean, std) in cells.items()
    }
    floor = {name: value**2 for name, value in floors(kept, "wasserstein2").items()}
    for metric, by_flow in C2OT_W2.items():
        theirs = {(flow, "moons-c2ot"): of for flow, of in by_flow.items()}
        ours = squared(reported(flowjobs, "c2ot", metric))
        compare(f"Cheng and Schwing, {metric} squared", ours, theirs, floor)
