import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flowjobs.cli.main import run as run_command
from flowjobs.data import dataset as dataset_module
from flowjobs.data.dataset import (
    load_datasets,
    load_digits,
    normalization_stats,
    write_splits,
)
from flowjobs.errors import DataError
from flowjobs.training import FlowDataset


def test_digits_are_the_real_ones(study: Path) -> None:
    train, val = load_datasets("digits", study)
    assert (len(train), len(val), train.dim) == (1527, 270, 64)
    assert train.data.max() == 16
    # The second time they come from the splits on disk, like any other dataset.
    assert torch.equal(load_datasets("digits", study)[0].data, train.data)
    assert (study / "datasets/splits/digits/val.pt").exists()


def test_splits_are_nested_and_share_their_validation_part(study: Path) -> None:
    data = torch.arange(200.0).reshape(100, 2)
    written = write_splits(FlowDataset(data), study, {"20": 20, "50": 50, "all": None})
    assert written == {"20": 20, "50": 50, "all": 85}
    parts = {name: load_datasets(name, study) for name in written}
    assert torch.equal(parts["20"][0].data, parts["50"][0].data[:20])
    assert torch.equal(parts["20"][1].data, parts["all"][1].data)
    rows = torch.cat([part.data for part in parts["all"]])
    assert torch.equal(rows.sort(0).values, data)


def test_a_split_larger_than_the_data_is_refused(study: Path) -> None:
    with pytest.raises(DataError, match="5k asks for 5000 training rows; 85 are left of 100"):
        write_splits(FlowDataset(torch.zeros(100, 2)), study, {"5k": 5000})


def test_a_split_of_other_rows_is_not_overwritten_by_mistake(study: Path) -> None:
    write_splits(FlowDataset(torch.zeros(100, 2)), study, {"20": 20})
    write_splits(FlowDataset(torch.zeros(100, 2)), study, {"20": 20})
    with pytest.raises(
        DataError, match="holds other rows: give these another --name; --overwrite repl"
    ):
        write_splits(FlowDataset(torch.ones(100, 2)), study, {"10": 10, "20": 20})
    assert not (study / "datasets/splits/10").exists()
    write_splits(FlowDataset(torch.ones(100, 2)), study, {"20": 20}, overwrite=True)
    assert load_datasets("20", study)[0].data.max() == 1


def test_one_row_cannot_be_split(study: Path) -> None:
    with pytest.raises(DataError, match="1 rows are too few"):
        write_splits(FlowDataset(torch.zeros(1, 2)), study, {"all": None})


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_a_file_of_ones_own(tmp_path: Path, study: Path, suffix: str) -> None:
    data = torch.randn(40, 3)
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pt":
        torch.save(data, path)
    else:
        np.save(path, data.numpy())
    train, val = load_datasets(str(path), study)
    assert (len(train), len(val), train.dim) == (34, 6, 3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(train.data, data[order[6:]])
    assert torch.equal(val.data, data[order[:6]])


def test_an_array_or_a_tensor_of_any_origin() -> None:
    data = torch.randn(40, 3)
    for source in (data.numpy().astype(">f4"), data.clone().requires_grad_() * 1):
        dataset = FlowDataset(source)
        assert torch.equal(dataset.data, data)
        assert not dataset.data.requires_grad


ROWS = np.ones((3, 2))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (ROWS.astype(object), "array is of type object, expected floats"),
        (ROWS.astype(str), "array is of type str.*, expected floats"),
        (ROWS.astype("datetime64[s]"), "array is of type datetime64"),
        (ROWS.astype(np.longdouble), r"array is of type .*float.*numpy\.float32"),
        (ROWS.astype(int), "array is of type int64, expected floats"),
        (np.ma.masked_equal(ROWS * [[1, 2]], 2), "array: some of its values are masked"),
        (ROWS.tolist(), r"found a list, expected the path .* numpy\.asarray"),
        (None, "found a NoneType"),
        (torch.ones(3, 2, device="meta"), "tensor is of the device meta"),
        (torch.ones(3, 2).to_sparse(), r"tensor is of layout torch\.sparse_coo, .*to_dense"),
    ],
)
def test_what_is_no_array_of_floats_is_said(source: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        FlowDataset(source)


def test_stats_normalize_the_training_part(study: Path) -> None:
    train, _ = load_datasets("digits", study)
    stats = normalization_stats(train)
    normal = (train.data - stats["mean"]) / stats["std"]
    assert normal.mean(0).abs().max() < 1e-5
    # A pixel that is nearly always black is not blown up: at most a tenth of the average.
    assert normal.std(0).max() < 1.01
    assert stats["std"].min() >= 0.099 * load_digits().std(0).mean()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (torch.zeros(3), r"has shape \(3,\), expected \(n, dim\)"),
        (torch.zeros(0, 3), r"has shape \(0, 3\), expected .* at least one row"),
        (torch.zeros(2, 3, dtype=torch.int64), "is of type int64, expected floats"),
        (
            torch.tensor([[1.0], [float("nan")]]),
            "row 1 has .* infinite .column 0.; no other row has one",
        ),
        (torch.tensor([[1.0], [2.0], [float("inf")]]), "row 2 has a value"),
    ],
)
def test_bad_data_is_refused_by_name_and_row(tmp_path: Path, data: torch.Tensor, said: str) -> None:
    path = tmp_path / "bad.pt"
    torch.save(data, path)
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + said):
        FlowDataset(path)


def test_a_bad_row_past_the_first_chunk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowjobs.data.dataset.CHUNK_BYTES", 4 * 2 * 8)
    data = torch.zeros(10, 2)
    data[9, 1] = float("inf")
    with pytest.raises(DataError, match="row 9"):
        FlowDataset(data)


@pytest.mark.parametrize("content", [b"", b"not a tensor", b"PK\x03\x04 torn"])
@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"torn{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(str(path))} cannot be read as a {suffix}"):
        FlowDataset(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"data": torch.zeros(2, 2)}, tmp_path / "dict.pt")
    with pytest.raises(DataError, match="holds a dict, expected one tensor"):
        FlowDataset(tmp_path / "dict.pt")
    torch.save(torch.utils.data.TensorDataset(torch.zeros(2, 2)), tmp_path / "set.pt")
    with pytest.raises(DataError, match=r"holds more than one tensor.*save that alone"):
        FlowDataset(tmp_path / "set.pt")


def test_two_widths_are_refused(study: Path) -> None:
    write_splits(FlowDataset(torch.randn(20, 2)), study, {"mine": None})
    torch.save(torch.randn(4, 3), study / "datasets/splits/mine/val.pt")
    with pytest.raises(DataError, match=r"shape \(2,\), .* of shape \(3,\)"):
        load_datasets("mine", study)


def test_constant_data_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        normalization_stats(FlowDataset(torch.ones(5, 2)))


def test_a_missing_dataset_lists_those_that_there_are(study: Path) -> None:
    write_splits(FlowDataset(torch.randn(20, 2)), study, {"1k": None})
    with pytest.raises(DataError, match="did you mean 1k"):
        load_datasets("10k", study)


def test_a_long_pass_over_all_rows_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = iter(range(0, 1000, 4))  # 4 s for each chunk
    monkeypatch.setattr(dataset_module, "CHUNK_BYTES", 8 * 10)
    clock = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr(dataset_module, "time", clock)
    FlowDataset(torch.zeros(200, 1))
    said = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert said == [f"tensor: {n} of 200 rows read in {s} s" for n, s in ((20, 12), (100, 44))]


def test_a_long_pass_is_seen_where_nobody_has_set_up_logging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(dataset_module, "SAY_AFTER_S", 0.0)
    monkeypatch.setattr(dataset_module, "CHUNK_BYTES", 8 * 10)
    np.save("rows.npy", np.arange(20.0).reshape(20, 1))
    assert run_command(["data", "split", "rows.npy"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"^rows.npy: 10 of 20 rows read in \d+ s, in a pass over", said, re.MULTILINE)
    assert re.search(r"^all: 10 of 17 rows read in \d+ s", said, re.MULTILINE)  # to be written
