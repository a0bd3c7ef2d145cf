"""Each flow's points and velocities against other sources, and what it refuses."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowjobs.config import BUILT_IN_FLOWS, TrainingConfig
from flowjobs.data.randomness import generator_for
from flowjobs.errors import ConfigError
from flowjobs.flows.flow import FLOWS, LEAST_VARIANCE, Flow, check_flow, flow_of
from flowjobs.flows.pairs import plan_of, sample_path, sample_times
from flowjobs.flows.uses import check_uses

SIGMA = 0.3
CPU = torch.device("cpu")


def draws(n: int = 256, dim: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0, x_1, t and noise, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x_0, x_1, noise = torch.randn((3, n, dim), generator=generator, dtype=torch.float64)
    return x_0, 2 * x_1 + 1, torch.rand(n, generator=generator, dtype=torch.float64), noise


def test_every_flow_that_the_config_knows_is_there() -> None:
    assert tuple(FLOWS) == BUILT_IN_FLOWS


@pytest.mark.parametrize("name", ["icfm", "otcfm", "fm", "sbcfm", "vpcfm", "reflow"])
def test_paths_and_velocities_are_those_of_torchcfm(name: str) -> None:
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    matcher = {
        "icfm": cfm.ConditionalFlowMatcher,
        "otcfm": cfm.ConditionalFlowMatcher,  # of pairs that are coupled already
        "fm": cfm.TargetConditionalFlowMatcher,
        "sbcfm": cfm.SchrodingerBridgeConditionalFlowMatcher,
        "vpcfm": cfm.VariancePreservingConditionalFlowMatcher,
        "reflow": cfm.ConditionalFlowMatcher,
    }[name](sigma=SIGMA)
    x_0, x_1, t, noise = draws()
    t = 0.01 + 0.98 * t  # near the ends theirs divides small by small
    # Its fm takes the noise where ours has the source.
    theirs = matcher.sample_xt(x_0, x_1, t, x_0 if name == "fm" else noise)
    x_t, dx_t = sample_path(FLOWS[name], (x_0, x_1), t, SIGMA, noise)
    torch.testing.assert_close(x_t, theirs, atol=1e-12, rtol=0)
    expected = matcher.compute_conditional_flow(x_0, x_1, t, theirs)
    torch.testing.assert_close(dx_t, expected, atol=1e-5, rtol=1e-6)
    prediction = torch.zeros_like(x_0)
    ours, others = (torch.nn.functional.mse_loss(prediction, u) for u in (dx_t, expected))
    assert float(ours) == pytest.approx(float(others), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "scheduler"), [("icfm", "CondOTScheduler"), ("vpcfm", "CosineScheduler")]
)
def test_paths_without_noise_are_those_of_flow_matching(name: str, scheduler: str) -> None:
    path = pytest.importorskip("flow_matching.path")
    schedulers = pytest.importorskip("flow_matching.path.scheduler")
    x_0, x_1, t, _ = draws()
    theirs = path.AffineProbPath(getattr(schedulers, scheduler)()).sample(x_0=x_0, x_1=x_1, t=t)
    x_t, dx_t = sample_path(FLOWS[name], (x_0, x_1), t, 0.0, None)
    torch.testing.assert_close(x_t, theirs.x_t)
    torch.testing.assert_close(dx_t, theirs.dx_t)


@pytest.mark.parametrize("name", BUILT_IN_FLOWS)
def test_the_velocity_is_the_derivative_of_the_path(name: str) -> None:
    x_0, x_1, t, noise = draws()
    t = 0.1 + 0.8 * t

    def at(times: Tensor) -> Tensor:
        return sample_path(FLOWS[name], (x_0, x_1), times, SIGMA, noise)[0]

    _, dx_t = sample_path(FLOWS[name], (x_0, x_1), t, SIGMA, noise)
    torch.testing.assert_close(dx_t, (at(t + 1e-6) - at(t - 1e-6)) / 2e-6, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", BUILT_IN_FLOWS)
def test_a_path_begins_at_the_source_and_ends_at_the_data(name: str) -> None:
    x_0, x_1, _, noise = (part.float() for part in draws())
    around = {"sbcfm": 0.0, "fm": 0.0}.get(name, SIGMA)
    for sigma, spread in ((SIGMA, noise), (0.0, None)):
        if name == "sbcfm" and spread is None:
            continue
        first, _ = sample_path(FLOWS[name], (x_0, x_1), torch.zeros(256), sigma, spread)
        last, _ = sample_path(FLOWS[name], (x_0, x_1), torch.ones(256), sigma, spread)
        beside = around * noise if spread is not None else 0.0
        at_end = SIGMA * x_0 if name == "fm" and spread is not None else beside
        torch.testing.assert_close(first, x_0 + beside, atol=1e-6, rtol=0)
        torch.testing.assert_close(last, x_1 + at_end, atol=1e-6, rtol=0)


def test_paths_of_pictures_are_those_of_their_pixels() -> None:
    x_0, x_1, t, noise = draws(dim=12)
    for flow in FLOWS.values():
        flat = sample_path(flow, (x_0, x_1), t, SIGMA, noise)
        shaped = sample_path(
            flow, (x_0.view(-1, 3, 2, 2), x_1.view(-1, 3, 2, 2)), t, SIGMA, noise.view(-1, 3, 2, 2)
        )
        for one, other in zip(flat, shaped, strict=True):
            assert torch.equal(one, other.flatten(1))


def test_the_loss_of_a_bridge_is_finite_over_a_million_times() -> None:
    n = 10**6
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(n, generator=generator)
    t[:4] = torch.tensor([0.0, 1.0, torch.finfo(torch.float32).tiny, 1 - 2**-24])
    noise = torch.randn((n, 1), generator=generator)
    zero = torch.zeros(n, 1)
    _, dx_t = sample_path(FLOWS["sbcfm"], (zero, zero), t, 1.0, noise)
    assert bool(dx_t.isfinite().all())
    assert float((dx_t / noise).abs().max()) <= 0.5 / math.sqrt(LEAST_VARIANCE) + 1e-3
    # What predicting zero scores: ∫ (1 - 2t)² / (4 max(t(1 - t), v)) dt, with s = 1 - 2t.
    root = math.sqrt(1 - 4 * LEAST_VARIANCE)
    expected = math.atanh(root) - root + (1 - root**3) / (12 * LEAST_VARIANCE)
    evenly = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    _, dx_t = sample_path(
        FLOWS["sbcfm"], (zero.double(), zero.double()), evenly, 1.0, 1 + zero.double()
    )
    assert float(dx_t.square().mean()) == pytest.approx(expected, rel=1e-4)


def test_targets_lose_no_digits_where_a_quotient_would() -> None:
    x_0, x_1, _, noise = draws()
    t = torch.full((256,), 1 - 1e-6, dtype=torch.float64)
    for name in ("fm", "sbcfm", "vpcfm"):
        exact = sample_path(FLOWS[name], (x_0, x_1), t, 1e-4, noise)[1]
        single = [part.float() for part in (x_0, x_1, t, noise)]
        _, dx_t = sample_path(FLOWS[name], (single[0], single[1]), single[2], 1e-4, single[3])
        assert float((dx_t.double() - exact).abs().max()) < 1e-4, name


@pytest.mark.parametrize("name", BUILT_IN_FLOWS)
def test_gradients_are_finite_in_bfloat16(name: str) -> None:
    x_0, x_1, t, noise = (part.float() for part in draws())
    t[:2] = torch.tensor([0.0, 1.0])
    model = torch.nn.Linear(4, 3)
    x_t, dx_t = sample_path(FLOWS[name], (x_0, x_1), t, SIGMA, noise)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(torch.cat([x_t, t[:, None]], dim=1))
    torch.nn.functional.mse_loss(found.float(), dx_t).backward()
    assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"flow": "fm", "source": "moons"},
            "--source: found moons, expected normal with --flow fm",
        ),
        ({"flow": "sbcfm"}, "--sigma: found 0.0, expected more than 0 with --flow sbcfm"),
        ({"flow": "reflow"}, "--reflow-from: found none, expected a finished run"),
        (
            {"flow": "icfm", "reflow_from": "a"},
            "--reflow-from: found a, and --flow icfm makes its own",
        ),
        ({"flow": "vpcfm", "ot_batch": 128}, "--ot-batch: found 128, and --flow vpcfm pairs no"),
        ({"flow": "math:nothing"}, "the module math has no nothing"),
        ({"flow": "nowhere.flows:mine"}, "no module nowhere on PYTHONPATH"),
        ({"flow": "math:pi"}, "found a float, expected a path, as a function of"),
    ],
)
def test_what_a_flow_cannot_be_used_with_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        flow_of(TrainingConfig(**options))


@pytest.mark.parametrize(
    ("field", "value", "decides", "used_with"),
    [
        ("time_mean", 0.5, "time_sampling", "logit-normal"),
        ("time_std", 2.0, "time_sampling", "logit-normal"),
        ("aug_strength", 0.2, "aug", "mixup"),
        ("ot_batch", 128, "flow", "otcfm"),
    ],
)
def test_a_field_without_a_use_is_refused(
    field: str, value: float, decides: str, used_with: str
) -> None:
    given: dict[str, Any] = {field: value}
    check_uses(TrainingConfig(**given, **{decides: used_with}))
    with pytest.raises(ConfigError, match=f"found {value} with --.*no use for it: leave it out"):
        check_uses(TrainingConfig(**given))


def my_path(
    x_0: Tensor, x_1: Tensor, t: Tensor, sigma: float, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x_0 + t**2 * (x_1 - x_0), 2 * t * (x_1 - x_0)


MINE = Flow(my_path, any_source=False)
NO_PLAN = Flow(my_path, couple=lambda x_0, x_1: x_0)  # type: ignore[misc, arg-type]
NO_FUNCTION: Any = Flow(my_path, couple="exact")  # type: ignore[arg-type]


OWN = """
from functools import partial, wraps
from flowjobs.flows.flow import Flow
raise SystemExit("run")
def path(x_0, x_1, t): ...
def right(x_0, x_1, t, sigma, noise=None): ...
def plan(x_0, x_1, sigma): ...
def time_first(t, x0, x1, sigma, eps): ...
def seed_first(x_0, x_1, seed, sigma): ...
def data_first(x_1, x_0, t, sigma, z): ...
SEED_FIRST = Flow(right, seed_first)
@wraps(right)
def wrapped(x_0): ...
NO_PATH = Flow(path)
NO_PLAN = Flow(right, couple=plan)
LAMBDA: Flow = Flow(path=lambda x_0, x_1: x_0)
ANY = [Flow(*[]), partial(path, t=1)]
FITS = Flow(right, lambda *all: all[0])
UNKNOWN = Flow(wrapped, partial(plan, 1))
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("path", r"takes \(x_0, x_1, t\), expected to be called with \(x_0, x_1, t, sigma, noise"),
        ("NO_PATH", r"NO_PATH: its path takes \(x_0, x_1, t\)"),
        ("NO_PLAN", r"its couple takes \(x_0, x_1, sigma\), .* with \(x_0, x_1, sigma, seed\)"),
        (
            "time_first",
            r"takes \(t, x0, x1, sigma, eps\), expected \(x_0, x_1, t, .* in this order",
        ),
        ("SEED_FIRST", r"its couple takes \(x_0, x_1, seed, sigma\), expected .* in this order"),
        ("LAMBDA", r"its path takes \(x_0, x_1\)"),
        ("pathh", "has no pathh; did you mean path"),
        *((name, None) for name in ("right", "wrapped", "ANY", "FITS", "UNKNOWN", "data_first")),
    ],
)
def test_how_a_flow_is_called_is_known_at_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str | None
) -> None:
    (tmp_path / "own_flow.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = TrainingConfig(flow=f"own_flow:{name}")
    if said is None:
        check_flow(config)
        return
    with pytest.raises(ConfigError, match=said):
        check_flow(config)


def test_a_flow_of_the_users_own_is_found_by_its_import_path() -> None:
    assert flow_of(TrainingConfig(flow=f"{__name__}:my_path")).path is my_path
    config = TrainingConfig(flow=f"squared={__name__}:MINE")
    assert flow_of(config) is MINE
    assert config.run_name == "mlp-squared-digits-none"
    assert config.user_modules == (__name__,)
    with pytest.raises(ConfigError, match=r"NO_FUNCTION: its couple is a str, expected a function"):
        flow_of(TrainingConfig(flow=f"{__name__}:NO_FUNCTION"))
    with pytest.raises(ConfigError, match=r"its couple takes \(x_0, x_1\), expected"):
        flow_of(TrainingConfig(flow=f"{__name__}:NO_PLAN"))


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda x_0, x_1: None, "None"),
        (lambda x_0, x_1: x_1, r"a tensor of type float64 and shape \(256, 3\)"),
        (lambda x_0, x_1: (x_0, x_1, x_1), "a tuple of 3"),
        (lambda x_0, x_1: (x_0, x_1.numpy()), "a tuple of 2"),
        (lambda x_0, x_1: (torch.cat([x_0, x_1]), x_1), r"x_t as .* shape \(512, 3\) and dx_t"),
        (lambda x_0, x_1: (x_0, x_1 * 1j), r".*dx_t as a tensor of type complex128"),
    ],
)
def test_what_is_no_path_is_said(returned: Any, found: str) -> None:
    x_0, x_1, t, _ = draws()
    flow = Flow(lambda x_0, x_1, t, sigma, noise: returned(x_0, x_1))
    with pytest.raises(ConfigError, match=rf"returns {found}.*expected \(x_t, dx_t\), both floats"):
        sample_path(flow, (x_0, x_1), t, 0.0, None)


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda n: None, "None"),
        (lambda n: (torch.arange(n), torch.arange(n)), "a tuple of 2"),
        (torch.eye, r"a tensor of type float32 and shape \(256, 256\)"),
        (lambda n: torch.ones(n).bool(), r"a tensor of type bool and shape \(256,\)"),
        (lambda n: torch.arange(n - 1), r".* shape \(255,\)"),
        (lambda n: torch.arange(n).unsqueeze(1), r".* shape \(256, 1\)"),
        (lambda n: torch.arange(n) - 1, ".*, from -1 to 254"),
        (lambda n: torch.arange(n) + 1, ".*, from 1 to 256"),
    ],
)
def test_what_is_no_plan_is_said(returned: Any, found: str) -> None:
    x_0, x_1, *_ = draws()
    with pytest.raises(ConfigError, match=f"for 256 rows the coupling returns {found}, expected"):
        plan_of(lambda x_0, x_1, sigma, seed: returned(len(x_1)), (x_0, x_1), 0.0, 0)


def test_times_follow_the_distribution_that_is_asked_for() -> None:
    torch.manual_seed(0)
    uniform = sample_times(100_000, TrainingConfig(), CPU)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    config = TrainingConfig(time_sampling="logit-normal", time_mean=-0.5, time_std=2.0)
    logits = torch.logit(sample_times(100_000, config, CPU).double())
    assert float(logits.mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(logits.std()) == pytest.approx(2.0, abs=0.02)


def test_what_changes_nothing_leaves_the_signature_of_older_runs() -> None:
    plain = TrainingConfig()
    older = {k: v for k, v in plain.to_dict().items() if k not in ("source", "ot_batch")}
    from flowjobs.config import signature_differences, signature_of

    assert signature_of(older) == plain.signature
    changed = TrainingConfig(source="moons", ot_batch=128)
    assert signature_of(changed.to_dict()) != plain.signature
    assert signature_differences(older, changed.to_dict()) == [
        "  --source: normal there, moons asked for",
        "  --ot-batch: None there, 128 asked for",
    ]


def test_generators_of_one_step_are_not_those_of_another() -> None:
    seeds = itertools.product(range(3), range(3))
    firsts = {float(torch.rand(1, generator=generator_for(CPU, *each))) for each in seeds}
    assert len(firsts) == 9
