"""What a sweep's description stands for: which runs, and what they are called."""

from pathlib import Path
from typing import Any

import pytest

from flowjobs.cli.defaults import load_defaults
from flowjobs.cli.main import parse
from flowjobs.cli.prepare_sweep import prepare_sweep
from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.sweeps.applying import applying
from flowjobs.sweeps.grid import Sweep, run_names_of, training_of
from flowjobs.sweeps.toml_file import read_sweep, to_toml

EVERYTHING = """
one_at_a_time = true
parallel = 8
[base]
epochs = 2
dataset = "data.npy"
[base.arch_args]
depth = 3
channels = [8, 16]
[grid]
flow = ["icfm", "otcfm"]
seed = [0, 1]
arch_args = { width = [64, 128] }
[[zip]]
lr = [1, 3e-4]
batch-size = [64, 256]
mem_gb = [8, 16]
[[include]]
arch = "a='b\\"c=pkg.models:Wide"
[[exclude]]
seed = 1
flow = ["icfm", "otcfm"]
[slurm]
sbatch = { reservation = "course" }
[tracking]
wandb_mode = "offline"
[restarts]
retries = 2
"""


def names(sweep: Sweep) -> list[str]:
    return run_names_of([training_of(point, TrainingConfig()) for point in sweep.points()])


def test_product_is_named_by_what_varies() -> None:
    sweep = Sweep(base={"epochs": 3}, grid={"flow": ["icfm", "otcfm"], "seed": [0, 1]})
    assert names(sweep) == [
        *("mlp-icfm-digits-none-seed0", "mlp-icfm-digits-none-seed1"),
        *("mlp-otcfm-digits-none-seed0", "mlp-otcfm-digits-none-seed1"),
    ]
    assert sweep.description == "2 flow x 2 seed"


def test_zipped_fields_walk_together() -> None:
    sweep = Sweep(grid={"lr": [1e-3, 1e-5], "batch_size": [64, 256], "seed": [0]})
    found = sweep.zipped(["lr", "batch-size"]).points()
    assert [(point["lr"], point["batch_size"]) for point in found] == [(1e-3, 64), (1e-5, 256)]
    assert names(sweep.zipped(["lr", "batch_size"]))[1].endswith("-batch_size256-lr1e-05")
    with pytest.raises(ConfigError, match="--zip: found 2 of lr, 1 of seed, expected equally"):
        sweep.zipped(["lr", "seed"])
    with pytest.raises(ConfigError, match="--zip: found sed, expected two or more fields"):
        sweep.zipped(["lr", "sed"])


def test_one_field_at_a_time_varies_around_the_first_values() -> None:
    sweep = Sweep(grid={"lr": [1e-3, 1e-4], "seed": [0, 1, 2]}, one_at_a_time=True)
    assert [(point["lr"], point["seed"]) for point in sweep.points()] == [
        *((1e-3, 0), (1e-4, 0), (1e-3, 1), (1e-3, 2))
    ]


def test_a_file_is_read_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(EVERYTHING)
    sweep = read_sweep(file)
    assert sweep.base == {
        "epochs": 2,
        "dataset": str(tmp_path / "data.npy"),  # relative to the file
        "arch_args.depth": 3,
        "arch_args.channels": [8, 16],
    }
    assert sweep.zips[0]["lr"] == [1.0, 3e-4]
    points = sweep.points()
    # The first, width 128, otcfm, the zip's second; seed 1 is left out; and what is included.
    assert len(points) == 1 + 1 + 1 + 1 + 1
    config = training_of(points[0], TrainingConfig())
    assert config.arch_args == {"depth": 3, "channels": [8, 16], "width": 64}
    file.write_text(to_toml(sweep))
    assert read_sweep(file) == sweep


def test_a_field_may_have_no_value_in_some_runs(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[[zip]]\nflow = ['icfm', 'otcfm']\not_batch = ['None', 128]\n")
    sweep = read_sweep(file)
    assert [point["ot_batch"] for point in sweep.points()] == [None, 128]
    file.write_text(to_toml(sweep))
    assert read_sweep(file) == sweep
    # Of an argument of a model, whose own default may be another, and of a changed default.
    file.write_text(
        "[base]\nparams = 'None'\narch_args.dropout = 'None'\narch_args.norms = ['None', 'layer']\n"
        "[grid]\narch_args.chunk = ['None', 8]\n"
    )
    sweep = read_sweep(file)
    assert sweep.base == {
        "params": None,
        "arch_args.dropout": None,
        "arch_args.norms": [None, "layer"],
    }
    assert sweep.grid == {"arch_args.chunk": [None, 8]}
    file.write_text(to_toml(sweep))
    assert read_sweep(file) == sweep


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (
            {"flow": ["icfm", "otcfm"], "ot_batch": [128, 256]},
            ["mlp-icfm-digits-none", *(f"mlp-otcfm-digits-none-ot_batch{n}" for n in (128, 256))],
        ),
        (
            {"flow": ["otcfm", "reflow"], "ot_batch": [128], "reflow_from": ["a"]},
            ["mlp-otcfm-digits-none", "mlp-reflow-digits-none"],
        ),
        (
            {"aug": ["none", "noise"], "aug_strength": [0.1, 0.2]},
            ["mlp-icfm-digits-none", *(f"mlp-icfm-digits-noise-aug_strength0.{n}" for n in (1, 2))],
        ),
        (
            {"time_sampling": ["uniform", "logit-normal"], "time_mean": [0.0, 1.0]},
            [
                "mlp-icfm-digits-none-time_samplinguniform",
                "mlp-icfm-digits-none-time_samplinglogit-normal-time_mean0.0",
                "mlp-icfm-digits-none-time_samplinglogit-normal-time_mean1.0",
            ],
        ),
        (
            {"arch": ["mlp", "dit"], "arch_args.heads": [2, 8]},
            ["mlp-icfm-digits-none", *(f"dit-icfm-digits-none-heads{n}" for n in (2, 8))],
        ),
    ],
)
def test_an_option_is_of_the_runs_that_have_a_use_for_it(
    grid: dict[str, Any], expected: list[str]
) -> None:
    points, left_out = applying(Sweep(grid=grid).points(), TrainingConfig())
    assert run_names_of([training_of(point, TrainingConfig()) for point in points]) == expected
    assert left_out.keys() < grid.keys()
    # Alone, a value of no use stays, and is refused as that of a single run.
    one = [{"flow": "icfm", "ot_batch": 128}]
    assert applying(one, TrainingConfig()) == (one, {})


def test_an_option_that_a_model_of_flowjobs_toml_does_not_take_is_left_out_of_its_runs(
    study: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(workplace)
    (workplace / "narrow_models.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self, dim): ...\n"
    )
    (workplace / "flowjobs.toml").write_text('[arch]\nnarrow = "narrow_models:Net"\n')
    sweep = Sweep(grid={"arch": ["dit", "narrow"], "arch_args.heads": [2, 8]})
    runs, _ = prepare_sweep(load_defaults({}), study, "a", sweep)
    assert [(c.training.arch, c.training.arch_args) for c in runs.values()] == [
        *(("dit", {"heads": 2}), ("dit", {"heads": 8})),
        ("narrow=narrow_models:Net", {}),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[grid]\nsede = [0]", r"\[grid\] sede: found no field; .*did you mean seed"),
        ("[grid]\nseed = 0", r"\[grid\] seed: found 0, expected a list"),
        ("[grid]\nseed = ['x']", r"\[grid\] seed: found 'x', expected int"),
        ("[base]\naug = 'nois'", r"\[base\] aug: found 'nois', expected none, noise"),
        ("[base]\nmem_gb = 3", r"\[base\] mem_gb: found no field"),
        ("[bas]\nseed = 0", "bas: found no part of a sweep.*did you mean base"),
        ("[[zip]]\nlr=[1]\nseed=[0,1]", "found 1 of lr, 2 of seed, expected equally many"),
        ("[slurm]\npartion='x'", r"\[slurm\] partion: found no option; .*partition"),
        ("[zip]\nlr=[1]", r"expected \[\[zip\]\]"),
        ("[grid]\nseed = [0]\n[[zip]]\nseed = [1]\nlr = [1]", r"seed in \[grid\] too"),
        ("[base]\narch_args.width = 1\n[grid]\narch_args.width = [2]", r"width in \[base\] too"),
        ("[grid]\nseed = [0]\n[[exclude]]", "found no field, and all runs would be left out"),
        ("parallel = 0", "parallel: found 0, expected a number"),
        (
            "[slurm.sbatch]\nbegin = 2026-12-01",
            r"\[slurm\] sbatch: found begin = 2026-12-01, expected",
        ),
        ("[grid.arch_args]\nsince = [2024-01-01]", "since: found 2024-01-01, expected text"),
        (
            "[[exclude]]\narch_args.a = [{b = [08:00:00]}]",
            "arch_args.a: found b = 08:00:00, expected",
        ),
        ("base = " + "[" * 3000, "recursion"),
        ("seed = ", "Invalid value"),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_sweep(file)


@pytest.mark.parametrize(
    ("grid", "same"),
    [
        ({"arch": ["one:Net", "other:Net"]}, "--arch: one:Net and other:Net(.|\n)*LABEL="),
        ({"flow": ["one:path", "other:path"]}, "--flow: one:path and other:path(.|\n)*LABEL="),
        ({"dataset": ["/a/x.npy", "/a/x.pt"]}, "--dataset: /a/x.npy and /a/x.pt"),
        ({"mem_gb": [8.0, 16.0]}, "options of the cluster alone"),
    ],
)
def test_two_runs_of_one_name_are_refused(grid: dict[str, Any], same: str) -> None:
    with pytest.raises(ConfigError, match=f"would both be named(.|\n)*{same}"):
        names(Sweep(grid=grid))


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"init_from": ["/s/a/best.pt", "/s/b/last.pt"]}, ["init_frombest", "init_fromlast"]),
        # Every checkpoint of flowjobs is called so.
        ({"init_from": ["/s/a/best.pt", "/s/b/best.pt"]}, ["init_froma_best", "init_fromb_best"]),
        (
            {"init_from": [None, "/s/a/best.pt", "/t/a/best.pt"]},
            ["init_fromNone", "init_froms_a_best", "init_fromt_a_best"],
        ),
        ({"dataset": ["/c/train.npy", "/d/val.npy"]}, []),
        ({"dataset": ["/c/train.npy", "/d/train.npy"]}, ["datasetc_train", "datasetd_train"]),
        ({"source": ["/c/x.npy", "/d/x.npy", "x"]}, ["sourcec_x", "sourced_x", "sourcex"]),
    ],
)
def test_files_of_one_name_are_told_apart_by_their_folders(
    grid: dict[str, Any], words: list[str]
) -> None:
    found = names(Sweep(grid=grid))
    assert [name.split("-", 4)[4:] for name in found] == ([[word] for word in words] or [[], []])


def test_names_fit_a_folder_and_differ_when_they_are_cut() -> None:
    long = "x" * 70
    sweep = Sweep(
        base={"arch": f"{long}=pkg:Net"},
        grid={"seed": [10**15, 10**15 + 1], "init_from": ["/a b/best.pt", "/a/last.pt"]},
    )
    found = names(sweep)
    assert len(set(found)) == 4
    assert all(len(name) == 100 for name in found)


def test_what_is_given_twice_or_excludes_nothing_is_counted_as_it_is() -> None:
    sweep = Sweep(grid={"seed": [0, 1, 1]}, exclude=({"seed": [7]}, {"seed": [1], "lr": [1.0]}))
    assert len(sweep.points()) == 2
    assert sweep.description.startswith("2 seed")
    assert sweep.unused_exclusions() == ["seed=7", "seed=1 lr=1.0"]


def test_flags_win_over_a_file(study: Path, workplace: Path) -> None:
    (workplace / "a.toml").write_text("""
        base = { lr = 1 }
        grid = { seed = [0, 1], qos = ["low", "high"] }
        zip = [{ epochs = [1, 2], flow = ["icfm", "otcfm"], mem_gb = [8, 16] }]
        include = [{ seed = 9, mem_gb = 32, nodes = 2 }]
        slurm = { partition = "gpu", mps = true, nodes = 1 }
    """)
    given = "--seed 5 --lr 2 3 --epochs 7 --mem-gb 64 --qos high --partition preempt --no-mps"
    command, defaults = parse(["sweep", "a.toml", *given.split()])
    _, found = command._asked(study, defaults)
    assert found.base == {"seed": 5, "epochs": 7}
    assert found.grid == {"lr": [2.0, 3.0]}
    assert found.zips == ({"flow": ["icfm", "otcfm"]},)
    assert found.include == ({"nodes": 2},)
    slurm = {"partition": "preempt", "mem_gb": 64.0, "qos": "high", "mps": False, "nodes": 1}
    assert found.slurm == slurm
