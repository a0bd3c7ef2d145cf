"""Numbers of every type and scale: each is trained right, or refused in words at the start."""

import itertools
import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.data.batches import make_batches
from flowjobs.data.dataset import (
    is_same_normalization,
    load_datasets,
    normalization_stats,
    split,
    write_splits,
)
from flowjobs.errors import ConfigError, DataError, RunInterrupted, TrainingDivergedError
from flowjobs.evaluation.measures import sliced_wasserstein
from flowjobs.flows.flow import icfm_path
from flowjobs.models.checks import check_types_of_ranks
from flowjobs.models.flops import flops_per_sample
from flowjobs.runs.run import Run
from flowjobs.training import EMAModel, FlowDataset, FlowTrainer
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.trained import load_trained
from flowjobs.training.trainer import Trainer
from tests.evaluation.drawing import sample
from tests.training.same import same

CPU = torch.device("cpu")
CONFIG = TrainingConfig(epochs=2, batch_size=16, lr=0.01, warmup_steps=0, grad_clip=0.5)


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


class Net(nn.Module):
    """A linear velocity; one of the sizes is of another type, where a case says so."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim, 8), nn.Linear(8, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)).to(self.second.weight.dtype)
        return self.second(hidden)


def net(change: Any = lambda model: None) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    change(model)
    return model


def constant(name: str, tensor: Tensor) -> Any:
    return lambda model: model.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def trainer_of(
    model: nn.Module, name: str | None = None, config: TrainingConfig = CONFIG, **options: Any
) -> FlowTrainer:
    data = torch.randn(100, 3, generator=torch.Generator().manual_seed(1)) * 3 + 1
    return FlowTrainer(model, config, *split(FlowDataset(data)), CPU, name=name, **options)


def train(model: nn.Module, name: str | None = None, **options: Any) -> float:
    return trainer_of(model, name, **options).train()["best_val_loss"]


TRAINED = {
    "float64": lambda model: model.double(),
    "float64 beside integers": lambda model: (
        constant("table", torch.arange(3))(model),
        constant("phase", torch.ones(3) * 1j)(model),
        model.double(),
    ),
    "float64 beside float32": lambda model: model.second.double(),
    "bfloat16 that is not trained": constant("table", torch.ones(3, dtype=torch.bfloat16)),
    "a parameter of integers": constant("table", torch.arange(3)),
    "a complex parameter that is not trained": constant("table", torch.ones(3) * 1j),
    "a slice that is not trained": constant("table", torch.ones(3, 9)[:, :3]),
    "a transposed parameter": lambda model: setattr(
        model.second, "weight", nn.Parameter(model.second.weight.data.t().contiguous().t())
    ),
    "buffers": lambda model: (
        model.register_buffer("steps", torch.tensor(0)),
        model.register_buffer("phase", torch.ones(2) * 1j),
        model.register_buffer("mask", torch.tensor([True])),
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_weights_of_other_types_train_like_float32(study: Path, case: str) -> None:
    expected = train(net())
    run = Run(study, CONFIG.run_name)
    weights = read_checkpoint(run.last)
    shutil.rmtree(study)
    found = train(net(TRAINED[case]))
    assert math.isclose(found, expected, rel_tol=1e-4)
    there = read_checkpoint(run.last)
    for part in ("model_state_dict", "ema_shadow"):
        for key, value in weights[part].items():
            assert torch.allclose(there[part][key].float(), value, atol=1e-4), key


def in_float64(*given: Any) -> tuple[Tensor, Tensor]:
    """The path of icfm, as one that computes with numpy's numbers returns it."""
    x_t, dx_t = icfm_path(*given)
    return x_t.double(), dx_t.double()


def in_float16(*given: Any) -> tuple[Tensor, Tensor]:
    x_t, dx_t = icfm_path(*given)
    return x_t.half(), dx_t.half()


def test_a_path_that_computes_in_another_type_is_trained(study: Path) -> None:
    losses = {
        name: train(net(), name, config=replace(CONFIG, flow=f"{__name__}:{name}"))
        for name in ("icfm_path", "in_float64", "in_float16")
    }
    assert losses["in_float64"] == losses["icfm_path"]
    assert math.isclose(losses["in_float16"], losses["icfm_path"], rel_tol=0.01)
    first, second = (read_checkpoint(Run(study, name).last) for name in ("icfm_path", "in_float64"))
    assert same(first["model_state_dict"], second["model_state_dict"])


REFUSED = {
    "a trained parameter of bfloat16": (
        lambda model: model.second.bfloat16(),
        "second.weight is of type bfloat16.*--precision bf16",
    ),
    "a trained parameter of float16": (lambda model: model.half(), "is of type float16"),
    "a trained complex parameter": (
        lambda model: model.register_parameter("phase", nn.Parameter(torch.ones(3) * 1j)),
        "phase is of type complex64, expected float32 or float64",
    ),
    "nothing to train": (lambda model: model.requires_grad_(False), "no parameter that requires"),
    "a lazy module": (
        lambda model: setattr(model, "second", nn.LazyLinear(3)),
        "second.weight has no shape before the first call",
    ),
    "values that share their memory": (
        constant("scale", torch.ones(1).expand(3)),
        r"several values of scale share their memory \(expand\)",
    ),
    "a slice of a larger tensor": (
        lambda model: setattr(model, "scale", nn.Parameter(torch.ones(3, 9)[:, :3])),
        "the parameter scale is a slice of a larger tensor.*contiguous_format",
    ),
    "sparse gradients": (
        lambda model: setattr(model, "table", nn.Embedding(9, 3, sparse=True)),
        "table has sparse gradients.*without sparse=True",
    ),
    "rows that are rescaled where they are looked up": (
        lambda model: setattr(model, "table", nn.EmbeddingBag(9, 3, max_norm=1.0)),
        "table rescales its rows.*without max_norm",
    ),
    "a sparse parameter": (
        constant("links", torch.eye(3).to_sparse()),
        r"links is sparse \(sparse_coo\), which neither AdamW.*make it a buffer",
    ),
    "what cannot be copied": (
        lambda model: setattr(model, "lock", threading.Lock()),
        r"--arch Net: the model cannot be copied.*cannot pickle '_thread.lock'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_would_not_train_right_are_refused(study: Path, case: str) -> None:
    change, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        train(net(change))
    assert not [*study.glob("checkpoints/*/*.pt")]


def test_weights_that_are_not_finite_as_they_were_built_are_named(study: Path) -> None:
    model = net(lambda model: nn.init.constant_(model.second.bias, math.nan))
    with pytest.raises(ConfigError, match=r"second.bias is not finite before the first.*torch.emp"):
        train(model)
    constant("mask", torch.tensor([0.0, -math.inf, 0.0]))(model := net())  # as of attention
    model.register_forward_hook(lambda part, args, out: out * part.mask.exp())
    train(model)  # what is not trained may be
    for part in ("model_state_dict", "ema_shadow"):
        weights = read_checkpoint(Run(study, CONFIG.run_name).best)[part]
        assert weights["mask"].tolist() == [0.0, -math.inf, 0.0]
    with pytest.raises(TrainingDivergedError, match=r"is not finite after the first step: look fo"):
        train(net(lambda model: model.first.register_forward_hook(lambda *a: a[2] * math.nan)), "b")
    assert not list(study.glob("checkpoints/b/*"))


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda x: x[:, :1], r"\(16, 1\)"),
        (lambda x: (x, x), "a tuple"),
        (lambda x: x * 1j, "numbers of type complex64"),
    ],
)
def test_what_is_no_velocity_ends_the_first_step(study: Path, returned: Any, found: str) -> None:
    model = net()
    model.forward = lambda x, t: returned(x)  # type: ignore[method-assign]
    expected = rf"forward returns {found}, expected a velocity of shape \(16, 3\)"
    with pytest.raises(ConfigError, match=expected):
        train(model)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda model, x: model.first(x).detach()[:, :3], "depends on no parameter"),
        (lambda model, x: -x, "parameters that forward does not use"),
        (
            lambda model, x: (torch.set_grad_enabled(False), model.first(x)[:, :3])[1],
            "gradients are switched off",
        ),
    ],
)
def test_a_velocity_that_cannot_be_trained_is_refused(study: Path, forward: Any, said: str) -> None:
    model = net()
    model.forward = lambda x, t: forward(model, x)  # type: ignore[method-assign]
    try:
        with pytest.raises(ConfigError, match=f"a velocity that cannot be trained.*{said}"):
            train(model)
    finally:
        torch.set_grad_enabled(True)


class Silent(Net):
    """Its `train` returns nothing, which no loop needs that calls it as a statement."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_train_of_ones_own_may_return_nothing(study: Path) -> None:
    torch.manual_seed(0)
    model = Silent()
    assert train(model, "silent") == train(net(), "none")
    assert flops_per_sample(model, (3,)) == flops_per_sample(net(), (3,)) == 2 * 2 * 3 * 8
    assert not load_trained(Run(study, "silent"), CPU, Silent()).model.training


class KeepsABatch(Net):
    """Keeps a tensor of the batch's size, which differs between training and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 3), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.cache = torch.zeros_like(x)
        return super().forward(x + self.cache, t)


def test_a_buffer_of_the_batchs_size_is_no_harm(study: Path) -> None:
    torch.manual_seed(0)
    assert train(KeepsABatch(), "keeps") == train(net(), "none")


class ComesAndGoes(Net):
    """Lets go of one buffer in training, takes up another, and the average does it its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gone", torch.zeros(3), persistent=False)
        self.register_buffer("come", None, persistent=False)
        self.register_buffer("unused", None)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.gone = None if self.training else torch.zeros(1)
        self.come = torch.zeros(3) if self.training else None
        return super().forward(x, t)


def test_a_buffer_that_comes_and_goes_is_no_harm(study: Path) -> None:
    torch.manual_seed(0)
    model = ComesAndGoes()
    assert train(model, "comes") == train(net(), "none")
    ema = EMAModel(model)
    model.come = torch.ones(3)
    ema.update(model)
    assert torch.equal(ema.model.come, model.come)
    model.come = None
    ema.update(model)
    assert ema.model.come is None


class Linked(Net):
    """A sparse matrix of its own as a buffer, another at each step where it can be resumed."""

    def __init__(self, layout: torch.layout = torch.sparse_coo) -> None:
        super().__init__()
        self.register_buffer("links", torch.eye(3).to_sparse(layout=layout))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training and self.links.layout is torch.sparse_coo:
            self.links = (self.links + torch.rand(3, 3).round().to_sparse()).coalesce() * 0.5
        return super().forward((self.links @ x.T).T, t)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_buffer_is_kept_and_comes_back(study: Path, layout: torch.layout) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Linked(layout)

    expected = train(model(), "whole")
    asked = itertools.count(1)
    with pytest.raises(RunInterrupted):
        train(model(), "parts", stop_reason=lambda: "test" if next(asked) == 7 else None)
    assert train(model(), "parts") == expected
    whole, parts = (read_checkpoint(Run(study, name).last) for name in ("whole", "parts"))
    for payload in (whole, parts):
        for part in ("model_state_dict", "ema_shadow"):
            payload[part]["links"] = payload[part]["links"].to_dense()
    assert same(whole, parts)
    assert same(whole["ema_shadow"]["links"], whole["model_state_dict"]["links"])


def test_another_default_type_trains_as_well(study: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = net()
        assert train(model) < 2
        assert model.first.weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("flow", ["icfm", "otcfm"])
def test_another_default_device_is_none_of_flowjobs_own_tensors(
    study: Path, monkeypatch: pytest.MonkeyPatch, flow: str
) -> None:
    """As a model's module sets cuda; what is made on meta cannot be used."""
    monkeypatch.setattr("flowjobs.data.dataset.LARGE_BYTES", 1)
    rows = torch.randn(120, 3, generator=torch.Generator().manual_seed(1))
    torch.save(rows, "rows.pt")
    torch.save(rows * 2 + 1, "other.pt")
    config = replace(CONFIG, flow=flow, dataset="rows.pt", normalize="columns")
    if flow == "otcfm":
        config = replace(config, source="other.pt", normalize="none", data_placement="loader")

    def whole_run(name: str) -> Any:
        model, run = net(), Run(study, name)
        torch.set_default_device("meta" if name == "other" else None)
        run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode="disabled")))
        data = load_datasets("rows.pt", study)
        Trainer(model, config, *data, CPU, run=run).train()
        write_splits(FlowDataset("rows.pt"), study / name, {"all": None})
        distance = sliced_wasserstein(data[1][:18], data[0][:18])
        return read_checkpoint(run.last), load_trained(run, CPU, model).sample(20), distance

    try:
        assert same(whole_run("plain"), whole_run("other"))
    finally:
        torch.set_default_device(None)


def test_parts_that_do_not_fit_are_refused_at_the_start(study: Path) -> None:
    rows = torch.randn(50, 3)
    for val, said in (
        (FlowDataset(rows[:, :2]), r"rows of shape \(3,\), the validation part of shape \(2,\)"),
        (rows, "the validation part is a Tensor, expected a FlowDataset"),
    ):
        with pytest.raises(DataError, match=said):
            FlowTrainer(net(), CONFIG, FlowDataset(rows), val, CPU)  # type: ignore[arg-type]
    assert not study.exists()


class FromFirstBatch(Net):
    """Like ActNorm: takes its scale from the first batch; counts its calls; normalizes batches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.calls == 0:
            self.scale.data.copy_(1 / x.std(0))
        self.calls += 1
        return super().forward(self.norm(x * self.scale), t)


def test_a_model_is_called_for_its_steps_alone(study: Path) -> None:
    torch.manual_seed(0)
    model = FromFirstBatch()
    train(model)
    assert model.calls == model.norm.num_batches_tracked == 2 * (85 // 16)
    assert ((model.scale > 0.3) & (model.scale < 3)).all()


class WritesScale(Silent):
    """Writes its scale where a function of it says so; that it has, it knows, but not its state."""

    def __init__(self, now: Any) -> None:
        super().__init__()
        self.scale, self.begun, self.now = nn.Parameter(torch.zeros(3)), False, now

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.now(self):
            self.scale.data.copy_(1 / x.std(0))
        self.begun = True
        return super().forward(x * self.scale, t)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (lambda model: not model.begun, "initializes scale from the first batch, and would again"),
        (lambda model: model.training and not model.begun, "initializes scale"),
        (lambda model: True, "changes scale in evaluation mode"),
        (lambda model: not model.training and not model.begun, "changes scale in evaluation mode"),
    ],
)
def test_weights_that_forward_writes_anew_in_each_process_are_refused(
    study: Path, now: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"forward {said}.*a buffer.*register_buffer"):
        train(WritesScale(now))
    assert not list(study.glob("checkpoints/*/best.pt"))


def test_weights_that_forward_normalizes_in_each_step_are_no_harm(study: Path) -> None:
    assert train(WritesScale(lambda model: model.training)) < 3


def puts_a_parameter(model: Any) -> None:
    if not model.called:
        model.scale = nn.Parameter(model.scale.data + 1)


def puts_a_module(model: Any) -> None:
    if not model.called:
        model.first = nn.Linear(3, 8)


def puts_a_frozen_one_later(model: Any) -> None:
    if model.called == 3:
        model.table = nn.Parameter(torch.ones(3), requires_grad=False)


class Replaces(Net):
    def __init__(self, replace: Any) -> None:
        super().__init__()
        self.scale, self.called, self.replace = nn.Parameter(torch.ones(3)), 0, replace
        self.table = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.replace(self)
        self.called += self.training
        return super().forward(x * self.scale + self.table, t)


@pytest.mark.parametrize(
    ("replace", "said"),
    [
        (puts_a_parameter, r"of scale, which is not trained.*\(self.scale.data.copy_\)"),
        (puts_a_module, "of first.weight, which is not trained"),
        (puts_a_frozen_one_later, "of table, which is not trained"),
    ],
)
def test_a_parameter_that_forward_replaces_is_refused(study: Path, replace: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"forward puts another parameter in the place {said}"):
        train(Replaces(replace))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_column_has_a_scale_of_its_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("flowjobs.data.dataset.CHUNK_BYTES", 100 * 8 * 7)
    n = 2000
    z = torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1e8, 1e-3, 1.0, 0.0, 0.0, 1.0, 1e-30])
    mean = torch.tensor([0.0, 0.0, 1e9 if dtype == torch.float64 else 1e5, 5.0, 0.0, 0.0, 1e-31])
    if dtype == torch.float64:
        scale[5], mean[5] = 1e-3, 1e8
    data = (z * scale + mean).to(dtype)
    whole = FlowDataset(data)
    stats = normalization_stats(whole)
    assert stats["mean"].dtype == torch.float64  # float32 would not hold the third column's mean
    for placement in ("device", "loader"):
        config = TrainingConfig(batch_size=n, data_placement=placement, num_workers=0)
        batches = make_batches(whole, config, 0, 1, stats["mean"], stats["std"])
        rows = batches.rows(0)
        assert rows.dtype == torch.float32
        varying = rows[:, [0, 1, 2, 5, 6]]
        assert torch.allclose(varying.std(0), torch.ones(5), atol=0.01)
        assert varying.mean(0).abs().max() < 1e-4
        assert (rows[:, [3, 4]] == 0).all()
    # What is constant is drawn as constant, beside columns that are 10**8 times larger.
    drawn = sample(net(lambda model: model.__init__(7)), 20, stats, CPU).x_1
    assert (drawn[:, 3:5] - mean[3:5]).abs().max() < 20


@pytest.mark.parametrize("shape", [(200_000, 1), (30_000, 1), (301, 3000)])
def test_a_normalization_follows_from_the_data_alone(shape: tuple[int, ...]) -> None:
    data = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(normalization_stats(FlowDataset(data)))
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert torch.allclose(found[0]["mean"], data.mean(0), rtol=0, atol=1e-14)
    assert torch.allclose(found[0]["std"], data.std(0, correction=0), rtol=1e-13)


@pytest.mark.parametrize("mean", [0.0, 1e9])
def test_a_normalization_is_the_same_but_for_rounding(mean: float) -> None:
    data = torch.randn(5000, 3, dtype=torch.float64) + mean
    stats = normalization_stats(FlowDataset(data))
    assert is_same_normalization(normalization_stats(FlowDataset(data.flip(0))), stats)
    for other in (data * 1.001, data[:-1], data[:, :2]):
        assert not is_same_normalization(normalization_stats(FlowDataset(other)), stats)
    assert not is_same_normalization({}, stats)


def test_a_column_that_hardly_ever_varies_is_not_blown_up() -> None:
    data = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    data *= torch.tensor([1e8, 1e8, 1.0])
    data[:, 2] = 0
    data[:3, 2] = torch.arange(1, 4)  # as in a file that is sorted
    stats = normalization_stats(FlowDataset(data))
    assert stats["std"].dtype == torch.float32
    assert abs((data - stats["mean"]) / stats["std"])[:, 2].max() < 2.1


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (torch.eye(3).to_sparse(), "table is of type sparse_coo, which several ranks cannot"),
        (torch.arange(3, dtype=torch.int16), "table is of type int16"),
        (torch.ones(3).to(torch.float8_e4m3fn), "table is of type float8_e4m3fn"),
    ],
)
def test_what_ranks_cannot_pass_to_one_another_is_refused(buffer: Tensor, said: str) -> None:
    check_types_of_ranks(net(lambda model: model.register_buffer("mask", torch.ones(3) > 0)))
    with pytest.raises(ConfigError, match=said):
        check_types_of_ranks(net(lambda model: model.register_buffer("table", buffer)))


def test_a_column_with_long_tails_keeps_its_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowjobs.data.dataset.CHUNK_BYTES", 100 * 8 * 3)
    normal = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    prices, counts = torch.exp(2 * normal[:, 1]), torch.exp(normal[:, 2])
    counts[:16_000] = 0
    data = torch.stack([1e6 * normal[:, 0], prices, counts], 1)
    stats = normalization_stats(FlowDataset(data))
    assert torch.allclose(((data - stats["mean"]) / stats["std"]).std(0), torch.ones(3), atol=0.01)


def test_values_that_are_too_large_are_refused() -> None:
    data = torch.randn(50, 2, dtype=torch.float64)
    data[:, 1] *= 1e200
    with pytest.raises(DataError, match="column 1 has values that are too large"):
        normalization_stats(FlowDataset(data))


def test_an_average_of_integers_is_a_copy() -> None:
    model = net(constant("table", torch.arange(3)))
    ema = EMAModel(model)
    model.get_parameter("table").add_(1)
    ema.update(model)
    assert ema.shadow["table"].tolist() == [1, 2, 3]
