"""Which runs a word, or several, mean."""

from pathlib import Path

import pytest

from flowjobs.config import RestartConfig, RunConfig, SlurmConfig, TrainingConfig
from flowjobs.errors import ConfigError, FlowjobsError, RunNotFoundError
from flowjobs.field_values import KeyValues
from flowjobs.runs.run import Run
from flowjobs.runs.selection import select


@pytest.fixture
def grid(study: Path) -> Path:
    """Two flows by three seeds, a wide one of another group, and a sweep of three runs."""
    for flow in ("icfm", "otcfm"):
        for seed in (0, 1, 10):
            training = TrainingConfig(flow=flow, seed=seed)  # type: ignore[arg-type]
            Run(study, f"mlp-{flow}-s{seed}").create(RunConfig(training))
    wide = TrainingConfig(
        arch="wide=nets:Wide",
        lr=3e-4,
        compile=True,
        group="widths",
        dataset="/data/5k.npy",
        arch_args=KeyValues(width=512, heads=2, seed=7),
    )
    Run(study, "wide").create(
        RunConfig(wide, SlurmConfig(partition="gpu"), restarts=RestartConfig(retries=2))
    )
    (study / "sweeps").mkdir()
    names = "mlp-otcfm-s1\nmlp-icfm-s1\nmlp-icfm-s2\n"  # the last one is not made yet
    (study / "sweeps/ones.runs").write_text(names)
    (study / "sweeps/later.runs").write_text("mlp-icfm-s3\n")
    return study


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["wide", "mlp-icfm-s0"], ["wide", "mlp-icfm-s0"]),
        (["study/runs/wide"], ["wide"]),
        (["study/checkpoints/wide/"], ["wide"]),
        (["mlp-icfm-*"], ["mlp-icfm-s0", "mlp-icfm-s1", "mlp-icfm-s10"]),
        (["wide", "*-s1", "*-icfm-s?"], ["wide", "mlp-icfm-s1", "mlp-otcfm-s1", "mlp-icfm-s0"]),
        (["ones"], ["mlp-otcfm-s1", "mlp-icfm-s1"]),
        (["sweep=ones"], ["mlp-icfm-s1", "mlp-otcfm-s1"]),
        (["widths"], ["wide"]),
        (["group=widths"], ["wide"]),
        (["flow=otcfm", "seed=0"], ["mlp-otcfm-s0"]),
        (["flow=otcfm", "seed=0", "seed=10"], ["mlp-otcfm-s0", "mlp-otcfm-s10"]),
        (["ones", "flow=icfm"], ["mlp-icfm-s1"]),
        (["lr=3e-4"], ["wide"]),
        (["lr=0.00030"], ["wide"]),
        (["arch=wide"], ["wide"]),
        (["arch=nets:Wide"], ["wide"]),
        (["arch=w*"], ["wide"]),
        (["dataset=5k"], ["wide"]),
        (["dataset=/data/5k.npy"], ["wide"]),
        (["dataset=data/5k.npy"], ["wide"]),
        (["dataset=5k.npy"], ["wide"]),
        (["arch_args.seed=7"], ["wide"]),
        (["width=512"], ["wide"]),
        (["partition=gpu"], ["wide"]),
        (["compile=true"], ["wide"]),
        (["retries=2"], ["wide"]),
        (["give-up-after=5", "arch=wide"], ["wide"]),
        (["compile=True"], ["wide"]),
        (["batch-size=64", "arch=wide"], ["wide"]),
    ],
)
def test_words_mean_these_runs(grid: Path, words: list[str], expected: list[str]) -> None:
    assert [run.name for run in select(grid, words).runs] == expected


def test_no_word_means_all(grid: Path) -> None:
    assert len(select(grid).runs) == 7
    assert select(grid / "elsewhere").runs == []


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["wied"], RunNotFoundError, "no run, sweep or group wied in .*did you mean wide"),
        (["widht"], RunNotFoundError, "sweeps: later, ones; groups: ablation, widths"),
        (["mpl-*"], RunNotFoundError, "no run matches mpl-"),
        (["later"], RunNotFoundError, "the sweep later in .* has no runs yet"),
        (["sweep=one"], RunNotFoundError, "no sweep one in .*did you mean ones"),
        (["flow=otcmf"], RunNotFoundError, "no run has flow=otcmf .*did you mean otcfm"),
        (["seed=True"], RunNotFoundError, "no run has seed=True"),
        (["compile=1"], RunNotFoundError, "no run has compile=1"),
        (["seed={[1]}"], RunNotFoundError, "no run has seed={"),
        (["seed=" + "-" * 3000 + "1"], RunNotFoundError, "no run has seed=---"),
        (["flow=otcfm", "width=512"], RunNotFoundError, "has flow=otcfm and width=512 together"),
        (["flwo=icfm"], ConfigError, "flwo=: found no such field.*did you mean flow"),
        (["haeds=2"], ConfigError, "arch_args.seed, heads; did you mean heads"),
        (["wide", "no-run"], RunNotFoundError, "no run, sweep or group no-run"),
    ],
)
def test_words_that_mean_nothing(
    grid: Path, words: list[str], error: type[FlowjobsError], said: str
) -> None:
    with pytest.raises(error, match=said):
        select(grid, words)


def test_of_many_sweeps_and_groups_only_those_nearby_are_named(grid: Path) -> None:
    for number in range(70):
        (grid / f"sweeps/lr{number}.runs").write_text("mlp-icfm-s1\n")
        training = TrainingConfig(group=f"night{number}")
        Run(grid, f"of-group-{number}").create(RunConfig(training))
    with pytest.raises(RunNotFoundError) as far:
        select(grid, ["zzz"])
    assert str(far.value).endswith(
        "there are 77 runs, none of that name or nearly so; there are 72 sweeps, none of that name "
        "or nearly so; there are 72 groups, none of that name or nearly so"
    )
    with pytest.raises(RunNotFoundError, match=r"did you mean lr7.*\(there are 72 sweeps\)"):
        select(grid, ["lr7x"])


def test_what_cannot_be_read_is_neither_meant_nor_forgotten(grid: Path) -> None:
    torn = Run(grid, "mlp-icfm-s0")
    torn.config_file.write_text('{"training": {"flow": "ic')
    found = select(grid, ["flow=icfm", "arch=mlp"])
    assert [run.name for run in found.runs] == ["mlp-icfm-s1", "mlp-icfm-s10"]
    assert list(found.unreadable) == [torn]
    assert select(grid, ["wide"]).unreadable == {}
    torn.status_file.touch()
    for _ in ("damaged", "lost"):
        assert select(grid, [torn.name]).runs == select(grid, [str(torn.folder)]).runs == [torn]
        torn.config_file.unlink(missing_ok=True)
