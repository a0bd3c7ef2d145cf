"""What stands in the cells of a report, and which of them is marked."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues
from flowjobs.report.comparison import Cell, Comparison, compare
from flowjobs.report.results import not_made, read_result
from flowjobs.report.text import cell_words, count_words, explanation, number_format
from flowjobs.runs.run import Run, run_names
from tests.report.made_up import evaluation, made_run


def compared(study: Path, **options: Any) -> Comparison:
    runs = [Run(study, name) for name in run_names(study)]
    return compare([read_result(run) for run in runs], **options)


def cell(found: Comparison, row: Sequence[str], column: Sequence[str] = ()) -> Cell:
    return found.cells[tuple(row), tuple(column)]


def marked(found: Comparison) -> set[str]:
    return {" ".join((*row, *column)) for (row, column), of in found.cells.items() if of.marked}


def test_what_varies_is_rows_and_columns(study: Path) -> None:
    for seed in (0, 1):
        for flow in ("icfm", "otcfm"):
            for lr in (1e-3, 1e-4):
                made_run(study, [1.0 + seed], flow=flow, lr=lr, seed=seed)
    found = compared(study)
    assert (found.row_fields, found.column_fields) == (("lr",), ("flow",))
    assert found.rows == [("0.0001",), ("0.001",)]
    of = cell(found, ["0.001"], ["icfm"])
    assert (of.mean, of.deviation, len(of.values)) == (1.5, pytest.approx(0.7071, abs=1e-4), 2)
    found = compared(study, rows=["flow", "lr"])
    assert (found.rows[0], found.columns) == (("icfm", "0.0001"), [()])
    found = compared(study, columns=["lr"])
    assert found.row_fields == ("flow",)


def test_values_that_are_counts_are_in_their_order_and_others_are_words(study: Path) -> None:
    for dataset in ("10_k", "5_k", "20k", "3_000"):
        made_run(study, [1.0], dataset=dataset)
    assert compared(study).rows == [("3_000",), ("20k",), ("10_k",), ("5_k",)]


def test_a_field_that_only_differs_between_cells_is_averaged_by_none(study: Path) -> None:
    for seed in range(3):
        for flow, ot_batch in (("icfm", None), ("otcfm", 128)):
            made_run(study, [1.0], name=f"{flow}{seed}", flow=flow, ot_batch=ot_batch, seed=seed)
    found = compared(study, rows=["flow"], columns=[])
    of = cell(found, ["otcfm"])
    assert (len(of.values), of.expected) == (3, 3)
    assert of.values.keys() == cell(found, ["icfm"]).values.keys()  # seeds are paired
    assert compared(study).row_fields == ("flow",)  # icfm has no use for ot_batch
    made_run(study, [1.0], name="other", flow="otcfm", ot_batch=64)
    with pytest.raises(ConfigError, match="another scale for each ot_batch"):
        compared(study, rows=["flow"], columns=[])


def test_arguments_of_a_model_are_fields_and_sort_by_size(study: Path) -> None:
    for width in (64, 128, 8):
        made_run(study, [1.0], name=f"w{width}", arch_args=KeyValues(width=width))
    made_run(study, [1.0], name="default")
    assert compared(study).rows == [("8",), ("64",), ("128",), ("-",)]


def test_models_of_one_size_are_compared_by_it_and_not_by_their_widths(study: Path) -> None:
    for arch, params, width in (("mlp", "500k", 224), ("mlp", "2M", 510), ("dit", "500k", 100)):
        made_run(study, [1.0], name=f"{arch}{params}", arch=arch, params=params, width=width)
    found = compared(study)
    assert (found.row_fields, found.rows) == (("params",), [("500k",), ("2M",)])
    assert not found.notes
    for run, parameters in (("mlp500k", 501_000), ("mlp2M", 2_010_000)):
        status = Run(study, run).status()
        status.parameters, status.flops_per_sample = parameters, 2 * parameters
        status.write(Run(study, run).status_file)
    found = compared(study)
    large = found.cells[("2M",), ("mlp",)]
    assert (large.parameters, large.flops_per_sample) == (2_010_000, 4_020_000)
    assert found.cells[("500k",), ("dit",)].parameters is None
    assert found.notes[0].endswith(": mlp 2M: 2.01M, 4.02M; mlp 500k: 501k, 1M")
    assert compared(study, rows=["dataset", "width"]).rows[0] == ("digits", "100")


def test_models_that_a_notebook_has_trained_are_told_apart(study: Path) -> None:
    for name, model, parameters in (
        ("small", "__main__:Net", 22),
        ("large", "__main__:Net", 580),
        ("large-1", "__main__:Net", 580),
        ("other", "lab:Other", 580),
        ("plain", "", 22),
    ):
        status = made_run(study, [1.0], name=name).status()
        status.model, status.parameters = model, parameters
        status.write(Run(study, name).status_file)
    found = compared(study)
    shown = {row[0]: len(cell(found, row).results) for row in found.rows}
    assert shown == {"Net (22 parameters)": 1, "Net (580 parameters)": 2, "Other": 1, "mlp": 1}


def test_what_is_missing_fails_or_runs_is_said(study: Path) -> None:
    for seed in range(3):
        made_run(study, [1.0, 1.0, 1.0], seed=seed)
    made_run(study, [2.0, 1.0, 1.0], lr=0.1, seed=0)
    made_run(study, [2.0, 1.5], "failed", lr=0.1, seed=1)
    made_run(study, [2.0], "failed", lr=0.2, seed=0)
    made_run(study, [2.0], "failed", lr=0.2, seed=1)
    made_run(study, lr=0.2, seed=2)
    made_run(study, [3.0], "cancelled", lr=0.3, seed=2)
    words = {
        "0.001": "n=3",
        "0.1": "1/2 seeds, 1 failed",
        "0.2": "2 failed, 1 waiting",
        "0.3": "1 cancelled",
    }
    # Of a sweep that has made no more of them.
    missing = [
        not_made(Run(study, f"lr{lr}-{seed}"), TrainingConfig(epochs=3, lr=lr, seed=seed))
        for lr, seed in ((0.1, 2), (0.3, 0), (0.3, 1), (0.4, 0))
    ]
    with_missing = {
        **words,
        "0.1": "1/3 seeds, 1 failed, 1 not submitted",
        "0.3": "1 cancelled, 2 not submitted",
        "0.4": "1 not submitted",
    }
    for some, expected in (([], words), (missing, with_missing)):
        found = compared(study, missing=some)
        assert {row[0]: count_words(cell(found, row)) for row in found.rows} == expected
        assert len(found.results) == 9


def test_a_run_that_is_not_made_is_with_those_of_the_same_weights(study: Path) -> None:
    pinned = "/s/a/best.pt@sha256:aa"
    for seed in (0, 1):
        made_run(study, [1.0], name=f"{seed}", init_from=pinned, seed=seed)
    asked = TrainingConfig(epochs=3, init_from="/s/a/best.pt", seed=2)
    found = compared(study, rows=["init_from"], missing=[not_made(Run(study, "2"), asked)])
    assert [count_words(of) for of in found.cells.values()] == ["2/3 seeds, 1 not submitted"]


def test_unfinished_runs_are_compared_at_the_last_step_that_all_have(study: Path) -> None:
    for seed in (0, 1):
        made_run(study, [3.0, 2.0, 1.0 + seed / 10], seed=seed)
        made_run(study, [3.1, 1.9], "running", lr=0.1, seed=seed)
    made_run(study, [9.0], "failed", lr=0.1, seed=2)  # holds nobody back
    made_run(study, lr=0.1, seed=3)  # nor does one without a row
    found = compared(study)
    assert found.metric.step == 20
    assert (cell(found, ["0.001"]).mean, cell(found, ["0.1"]).mean) == (2.0, 1.9)
    assert count_words(cell(found, ["0.1"])) == "2/4 seeds, 1 failed, 2 running, 1 waiting"
    assert "4 of 6 runs are not finished: all are compared at step 20" in found.notes
    assert cell(compared(study, at_step=10), ["0.1"]).mean == 3.1
    assert cell(compared(study, at_step="end"), ["0.1"]).mean is None
    assert cell(compared(study, at_step="end"), ["0.001"]).mean == 1.05


def test_one_that_was_given_more_epochs_waits_until_it_has_trained_them(study: Path) -> None:
    for seed in range(3):
        losses = [3.0, 2.0, 1.0, 0.5][: 4 if seed == 0 else 2]
        run = made_run(study, losses, measures={"sliced": 0.5}, seed=seed, epochs=len(losses))
        run.create(RunConfig(replace(run.config().training, epochs=4)))
    for options, expected in (
        ({"metric": "sliced"}, (0.5, "1/3 seeds, 2 waiting")),
        ({"at_step": "end"}, (0.5, "1/3 seeds, 2 waiting")),
        ({"metric": "val/loss"}, (2.0, "n=3, 2 waiting")),  # at step 20, which all have
    ):
        of = cell(compared(study, **options), [])
        assert (of.mean, count_words(of)) == expected


def test_one_that_stopped_early_keeps_its_last_value(study: Path) -> None:
    made_run(study, [3.0], seed=0)
    made_run(study, [3.0, 2.0], "running", lr=0.1)
    found = compared(study)
    assert (found.metric.step, cell(found, ["0.001"]).mean) == (20, 3.0)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # The spread over seeds is large, and the same for both: the difference is always 0.1.
        ({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.1, 3.1]}, {"a"}),
        # The means differ as much, but not in each seed.
        ({"a": [1.0, 2.0, 3.0], "b": [3.1, 1.1, 2.1]}, {"a", "b"}),
        # One more that is far from both.
        ({"a": [1.0, 2.0, 3.0], "b": [3.1, 1.1, 2.1], "c": [9.0, 9.1, 9.2]}, {"a", "b"}),
        # One seed says nothing of chance, whether it is the best or not.
        ({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.1, 3.1], "c": [0.5]}, {"a"}),
        ({"a": [1.0], "b": [2.0]}, set()),
        ({"a": [1.0, 1.1, 1.2], "b": [1.0, 1.1, 1.2]}, {"a", "b"}),
        # Two seeds tell little: t is 12.7.
        ({"a": [1.0, 2.0], "b": [1.1, 2.2]}, {"a", "b"}),
    ],
)
def test_the_best_is_marked_where_chance_does_not_explain_it(
    study: Path, losses: dict[str, list[float]], expected: set[str]
) -> None:
    for arch, values in losses.items():
        for seed, loss in enumerate(values):
            made_run(study, [loss], arch=f"{arch}=nets:{arch}", seed=seed)
    assert marked(compared(study)) == expected


def test_what_each_seed_has_of_its_own_beside_it_is_paired_by_the_seed(study: Path) -> None:
    for seed in range(3):
        measures = {"sliced": 0.7 + seed / 100}
        made_run(study, [1.0], measures=measures, flow="icfm", seed=seed)
        for teacher in ("t", "u"):
            made_run(
                study,
                [1.0],
                measures={"sliced": 1.5 + seed / 99},
                name=f"{teacher}{seed}",
                flow="reflow",
                reflow_from=f"{teacher}{seed}@sha256:{teacher}{seed}",
                seed=seed,
            )
    found = compared(study, rows=[], columns=["flow"])
    assert len(cell(found, [], ["reflow"]).values) == 6
    assert marked(found) == {"icfm"}
    assert "for want of" not in str(found.notes)


@pytest.mark.parametrize(
    ("seeds", "expected", "not_compared"),
    [
        ({"a": (0, 1), "b": (1, 2, 3)}, set(), "b"),
        ({"a": (0, 1), "b": (0, 1, 2), "c": (1, 2, 3)}, {"a"}, "c"),
        # One seed says nothing in any case, as its n=1 shows.
        ({"a": (0, 1), "b": (0, 1, 2), "c": (3,)}, {"a"}, ""),
    ],
)
def test_cells_without_two_common_seeds_are_not_compared_and_that_is_said(
    study: Path, seeds: dict[str, Sequence[int]], expected: set[str], not_compared: str
) -> None:
    for number, (arch, some) in enumerate(seeds.items()):
        for seed in some:
            made_run(study, [1.0 + seed + number / 10], arch=f"{arch}=nets:{arch}", seed=seed)
    found = compared(study)
    assert marked(found) == expected
    said = "not compared with a (the best mean), having fewer than two seeds in common"
    assert found.notes == ([f"{not_compared}: {said}"] if not_compared else [])


def test_losses_of_different_flows_are_never_ranked_or_mixed(study: Path) -> None:
    for seed in range(3):
        made_run(study, [1.0 + seed], flow="icfm", seed=seed)
        made_run(study, [0.5 + seed], flow="otcfm", seed=seed)
        made_run(study, [0.5 + seed], flow="otcfm", lr=0.1, seed=seed)
    found = compared(study)
    assert marked(found) == set()
    assert "validation losses of another flow have another floor" in found.notes[0]
    with pytest.raises(ConfigError, match="add flow to --rows or --columns, or select one"):
        compared(study, rows=["lr"], columns=[])


@pytest.mark.parametrize("field", ["sigma", "dataset"])
def test_nor_are_those_of_other_noise_or_data(study: Path, field: str) -> None:
    for seed in range(3):
        for value in (0.0, 0.1) if field == "sigma" else ("digits", "/data/5k.npy"):
            for lr in (0.1, 0.2):
                name = f"{seed}-{str(value)[-4:]}-{lr}"
                made_run(study, [lr + seed], name=name, lr=lr, seed=seed, **{field: value})
    found = compared(study)
    # Each set of data has a best of its own; noise is said to have another floor.
    assert marked(found) == (set() if field == "sigma" else {"0.1 digits", "0.1 5k"})
    with pytest.raises(ConfigError, match=f"add {field} to"):
        compared(study, rows=["lr"], columns=[])


def test_samples_are_compared_by_a_measure_where_all_have_it(study: Path) -> None:
    for seed in range(3):
        one, other = ({"nn_train": 1.0, "sliced": base + seed / 99} for base in (0.3, 0.1))
        made_run(study, [1.0], measures=one, flow="icfm", seed=seed)
        run = made_run(study, [2.0], measures=other, flow="otcfm", seed=seed)
    found = compared(study)
    assert found.metric.name == "sliced"
    assert marked(found) == {"otcfm"}
    assert any("floor: what real data score in the samples' place: 0.05" in n for n in found.notes)
    at_calls = compared(study, metric="sliced@8")
    assert cell(at_calls, ["otcfm"]).mean == pytest.approx(2 * (0.1 + 1 / 99))
    assert marked(compared(study, metric="nn_train")) == set()  # neither is better
    with pytest.raises(ConfigError, match="sliced is measured at the end"):
        compared(study, metric="sliced", at_step=10)
    with pytest.raises(ConfigError, match="no run has sliced@9"):
        compared(study, metric="sliced@9")
    # Taken with another number of samples: of no use beside the others.
    run.evaluation_file.write_text(json.dumps(evaluation({"nn_train": 1.0, "sliced": 0.0}, n=64)))
    found = compared(study)
    assert marked(found) == set()
    assert "taken in other ways" in found.notes[0]
    assert f"n 64, repeats 2, solver midpoint, 25 steps: {run.name})" in found.notes[0]
    # Of step 10, before it was trained on.
    run.metrics_file.write_text(
        '{"step": 10, "val/loss": 2.0, "val/best_loss": 2.0}\n{"step": 15, "train/loss": 1}\n'
        '{"step": 20, "val/loss": 1.0, "val/best_loss": 1.0}\n'
        '{"step": 30, "val/loss": 1.0, "val/best_loss": 1.0}\n'
    )
    for step, taken in ((20, True), (10, False)):
        of = evaluation({"nn_train": 1.0, "sliced": 0.5}) | {"step": step}
        run.evaluation_file.write_text(json.dumps(of))
        found = compared(study, metric="sliced")
        words = "n=3" if taken else "2/3 seeds, 1 not evaluated"
        assert count_words(cell(found, ["otcfm"])) == words
        assert (
            f"evaluated before they were trained further: {run.name}" in found.notes
        ) is not taken
    assert compared(study).metric.name == "best_val_loss"
    run.evaluation_file.unlink()
    assert compared(study).metric.name == "best_val_loss"
    assert count_words(cell(compared(study, metric="sliced"), ["otcfm"])) == (
        "2/3 seeds, 1 not evaluated"
    )


@pytest.mark.parametrize(
    ("field", "values", "shown"),
    [
        ("dataset", ("/a/faces/5k.npy", "/a/cars/5k.npy"), ("faces/5k.npy", "cars/5k.npy")),
        ("source", ("/a/5k.npy", "/a/5k.pt"), ("5k.npy", "5k.pt")),
        ("init_from", ("/A/a.pt@sha256:aa", "/B/a.pt@sha256:bb"), ("A/a.pt", "B/a.pt")),
        ("init_from", ("/A/a.pt@sha256:aa", "/A/a.pt@sha256:bb"), ("a.pt (aa)", "a.pt (bb)")),
        ("reflow_from", ("one@sha256:aa", "one@sha256:bb"), ("one (aa)", "one (bb)")),
        ("arch", ("ours:Net", "theirs:Net"), ("ours:Net", "theirs:Net")),
        ("flow", ("ours:path", "theirs:path"), ("ours:path", "theirs:path")),
        ("arch_args", (KeyValues(k=1), KeyValues(k="1")), ("1 (1)", '1 ("1")')),
        ("arch_args", (KeyValues(sigma=1), KeyValues(sigma=2)), ("1", "2")),
    ],
)
def test_values_that_a_runs_name_has_one_word_for_are_two_cells(
    study: Path, field: str, values: Sequence[Any], shown: Sequence[str]
) -> None:
    for number, value in enumerate(values):
        flow = "reflow" if field == "reflow_from" else "icfm"
        for seed in (0, 1):
            name = f"{number}-{seed}"
            made_run(study, [number], name=name, seed=seed, **{"flow": flow, field: value})
    found = compared(study)
    argument = next(iter(values[0])) if field == "arch_args" else field
    assert found.row_fields == ("arch_args.sigma" if argument == "sigma" else argument,)
    assert {row[0]: of.mean for (row, _), of in found.cells.items()} == dict(
        zip(shown, (0, 1), strict=True)
    )
    if field not in ("init_from", "arch", "arch_args"):
        with pytest.raises(ConfigError, match=f"has another scale for each {field}"):
            compared(study, rows=["lr"], columns=[])


def test_data_are_the_same_if_their_content_is(study: Path) -> None:
    def made(where: Path, seed: int, digest: str, dataset: str = "5k") -> Run:
        run = made_run(where, [1.0], name=f"{digest}{seed}", seed=seed, dataset=dataset)
        content = {"rows": 9, "dim": 2, "dtype": "float32", "digest": digest}
        run.data_file.write_text(json.dumps({"train": content, "val": content}))
        return run

    there = study.with_name("there")
    runs = [made(study, 0, "aa"), made(study, 1, "aa"), made(there, 2, "aa"), made(there, 0, "bb")]
    waits = made_run(there, name="waits", dataset="5k", seed=3)
    found = compare([read_result(run) for run in (*runs[:3], waits)])
    assert (found.row_fields, count_words(cell(found, []))) == ((), "3/4 seeds, 1 waiting")
    found = compare([read_result(run) for run in (*runs[:2], runs[3])])
    assert set(found.rows) == {("study/5k",), ("there/5k",)}
    made(study, 2, "cc")  # written anew
    assert set(compared(study).rows) == {("5k (aa, aa)",), ("5k (cc, cc)",)}


def test_code_that_was_edited_between_runs_of_a_cell_is_said(study: Path) -> None:
    for arch, digests in (("nets:Net", "aab"), ("mlp", "ccd")):
        for seed, digest in enumerate(digests):
            run = made_run(study, [1.0], arch=arch, seed=seed, name=f"{arch[:3]}{seed}")
            run.code_file.write_text(json.dumps({"digest": digest, "roots": [], "folder": "/"}))
    said = "a cell averages over runs of code that was edited in between "
    assert compared(study).notes == [f"{said}(code a: net0, net1; code b: net2)"]
    for seed, digest in enumerate("ab"):
        run = made_run(study, [1.0], arch="nets:Other", seed=seed, name=f"other{seed}")
        run.code_file.write_text(json.dumps({"digest": digest, "roots": [], "folder": "/"}))
    (note,) = compared(study).notes
    assert note.startswith("2 cells average over runs of code that was edited in between (code a: ")


def test_higher_may_be_better(study: Path) -> None:
    for seed in range(3):
        for lr in (0.1, 0.2):
            made_run(study, [1.0], measures={"coverage": lr + seed / 100}, lr=lr, seed=seed)
    assert marked(compared(study)) == {"0.2"}


def test_what_is_best_at_chance_is_ranked_by_the_distance_from_it(study: Path) -> None:
    for seed in range(3):
        for lr, value in ((0.1, 0.2), (0.2, 0.52), (0.3, 0.9)):
            made_run(study, [1.0], measures={"c2st": value + seed / 100}, lr=lr, seed=seed)
    found = compared(study)
    assert marked(found) == {"0.2"}
    assert "the nearer to 0.5 the better" in explanation(found)
    assert "lower is better" not in explanation(found)
    # Of other data it is another value.
    for run in [Run(study, name) for name in run_names(study)]:
        of = evaluation({"memorization": 1.0})
        of["measures"]["memorization"] |= {"value": 0.8 + run.config().training.lr, "best": 0.9}
        run.evaluation_file.write_text(json.dumps(of))
    for seed in range(3):
        for lr, value in ((0.1, 0.6), (0.2, 0.7)):
            measures = {"memorization": value + seed / 100}
            run = made_run(study, [1.0], measures=measures, lr=lr, seed=seed, dataset="moons")
            of = json.loads(run.evaluation_file.read_text())
            of["measures"]["memorization"]["best"] = 0.5
            run.evaluation_file.write_text(json.dumps(of))
    found = compared(study)
    assert marked(found) == {"0.1 digits", "0.1 moons"}
    assert "the nearer to 0.5 or 0.9 the better" in explanation(found)


@pytest.mark.parametrize("metric", ["sliced", "nn_train"])
def test_what_is_taken_alike_for_each_set_of_data_is_ranked(study: Path, metric: str) -> None:
    runs: dict[str, list[Run]] = {"digits": [], "moons": []}
    for seed in range(3):
        for lr in (0.1, 0.2):
            for dataset, n in (("digits", 270), ("moons", 2000)):
                run = made_run(study, [1.0], lr=lr, seed=seed, dataset=dataset)
                of = evaluation({metric: lr + seed / 100}, n=n) | {"nearest_among": 100_000}
                run.evaluation_file.write_text(json.dumps(of))
                runs[dataset].append(run)
    ranked = {"0.1 digits", "0.1 moons"} if metric == "sliced" else set()
    found = compared(study, metric=metric)
    assert (marked(found), "taken in other ways" in str(found.notes)) == (ranked, False)
    # Of which nn_train alone depends.
    of["nearest_among"] = 10_000
    run.evaluation_file.write_text(json.dumps(of))
    found = compared(study, metric=metric)
    assert marked(found) == ranked
    assert ("taken in other ways" in str(found.notes)) is (metric == "nn_train")
    # A loss of other noise where the data are other anyway.
    for run in runs["moons"]:
        config = json.loads(run.config_file.read_text())
        config["training"]["sigma"] = 0.1
        run.config_file.write_text(json.dumps(config))
    found = compared(study, metric="best_val_loss", rows=["lr"], columns=["dataset"])
    assert marked(found) == {"0.1 digits", "0.2 digits", "0.1 moons", "0.2 moons"}


def test_the_loss_of_a_coupled_flow_depends_on_the_batch_size(study: Path) -> None:
    for seed in range(3):
        for size in (64, 128):
            name = f"{size}-{seed}"
            made_run(study, [size + seed], name=name, flow="otcfm", batch_size=size, seed=seed)
    found = compared(study)
    assert (marked(found), "losses of another batch_size" in found.notes[0]) == (set(), True)
    for flow, ot_batch in (("otcfm", 128), ("icfm", None)):
        for run in (Run(study, name) for name in run_names(study)):
            shutil.rmtree(run.folder)
        for seed in range(3):
            for size in (64, 128):
                options = {"flow": flow, "ot_batch": ot_batch, "batch_size": size}
                made_run(study, [size + seed], name=f"{size}-{seed}", seed=seed, **options)
        assert marked(compared(study)) == {"64"}


def test_a_loss_of_validation_is_known_while_a_long_epoch_trains(study: Path) -> None:
    run = made_run(study, [1.0], "running")
    long = [{"step": 10 + step, "epoch": 2, "train/loss": 1.0} for step in range(10, 1000, 10)]
    with run.metrics_file.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in long)
    assert cell(compared(study, metric="val/loss"), []).mean == 1.0


def test_a_training_loss_depends_on_the_times_and_the_augmentation(study: Path) -> None:
    for seed in range(3):
        for aug in ("none", "noise"):
            run = made_run(study, [1.0], aug=aug, seed=seed)
            row = {"step": 10, "epoch": 1, "train/loss": seed + (aug == "noise"), "val/loss": 1}
            run.metrics_file.write_text(json.dumps(row) + "\n")
    assert marked(compared(study, metric="train/loss")) == set()


def test_the_energy_of_paths_is_compared_from_one_source_alone(study: Path) -> None:
    for seed in range(3):
        for lr in (0.1, 0.2):
            for source in ("normal", "moons"):
                measures = {"npe": lr + (source == "moons") + seed / 100, "frechet": 1.0}
                name = f"{source}{lr}{seed}"
                options = {"lr": lr, "source": source, "seed": seed}
                made_run(study, [1.0], measures=measures, name=name, **options)
    found = compared(study, metric="npe")
    assert len(marked(found)) == 2
    with pytest.raises(ConfigError, match="add source to"):
        compared(study, metric="npe", rows=["lr"], columns=[])
    assert "frechet: n is small" in compared(study, metric="frechet").notes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": ["widht"]}, "found widht, expected fields of the config; these vary: lr"),
        ({"rows": ["lr"], "columns": ["lr"]}, "found lr in both"),
        ({"metric": ""}, "--metric: found '', expected one of best_val_loss"),
        ({"at_step": 0}, "--at-step: found 0, expected at least 1, or end"),
        ({"at_step": -3, "metric": "val/loss"}, "--at-step: found -3, expected at least 1"),
        ({"metric": "val/los"}, "found val/los, expected one of .*did you mean val/loss"),
    ],
)
def test_what_there_is_not(study: Path, options: dict[str, Any], said: str) -> None:
    for lr in (0.1, 0.2):
        made_run(study, [1.0], lr=lr)
    with pytest.raises(ConfigError, match=said):
        compared(study, **options)


def test_the_same_run_under_two_names_is_one_seed_and_that_is_said(study: Path) -> None:
    made_run(study, [1.0], name="one")
    made_run(study, [2.0], name="two")
    made_run(study, [3.5], name="other", seed=1)
    asked = not_made(Run(study, "three"), TrainingConfig(epochs=3))
    found = compared(study, missing=[asked])
    shown = cell_words(cell(found, []), number_format(found))
    assert shown == "2.5 ± 1.4 (n=2, 1 not submitted)"
    said = "runs alike in all fields count as one seed, by their mean: one = two"
    assert found.notes == [said]


def test_what_is_averaged_beside_seeds_is_said(study: Path) -> None:
    made_run(study, [1.0])
    made_run(study, [4.0], lr=0.1)
    found = compared(study, rows=[], columns=[])
    assert found.notes == ["each cell averages over lr too: give it to --rows or --columns"]
    assert len(cell(found, []).values) == 2
