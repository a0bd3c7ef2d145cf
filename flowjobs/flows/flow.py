"""Every flow: its path from x_0 to x_1, the velocity along it, and what it asks of a run.

What the trainer, the validation, the config and the batches must know of a flow, the flow says of
itself here; none of them knows a name. Loads no torch, so that `submit` can ask: the functions only
call methods of the tensors that they are given.

Names as in torchcfm. Sources:
    Tong et al., Improving and generalizing flow-based generative models with minibatch optimal
    transport (https://arxiv.org/abs/2302.00482): icfm, otcfm, sbcfm, fm as its eq. 11
    Lipman et al., Flow matching for generative modeling (https://arxiv.org/abs/2210.02747): fm
    Albergo and Vanden-Eijnden (https://arxiv.org/abs/2209.15571): vpcfm
    Liu et al., Flow straight and fast (https://arxiv.org/abs/2209.03003): reflow
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.flows.coupling import entropic, exact
from flowjobs.flows.source import COUPLE, PATH, check_flow_source
from flowjobs.user_code import check_binds, check_module, imported

if TYPE_CHECKING:
    from torch import Tensor

# From x_0, x_1, t, sigma and the noise to x_t and dx_t, all of one shape (batch, *shape), t of
# (batch, 1, …) in [0, 1]; noise is standard normal, or None where sigma is 0.
Path = Callable[["Tensor", "Tensor", "Tensor", float, "Tensor | None"], tuple["Tensor", "Tensor"]]
# From x_0 and x_1, both (batch, dim), sigma and a seed to the row of x_0 that each row of x_1 is
# paired with, int64 of shape (batch,).
Coupling = Callable[["Tensor", "Tensor", float, int], "Tensor"]

# sbcfm's target has t(1 - t) below a root; below this it is taken to be this. See `sbcfm_path`.
LEAST_VARIANCE = 1e-4


@dataclass(frozen=True)
class Flow:
    """A flow: its path, its coupling, and what it requires of a run.

    Attributes:
        path: The points x_t and the velocity dx_t there, which a model should predict.
        couple: How the rows of a batch are paired; None takes them as they come. The loss of a
            flow that couples depends on the size of the batch. One of the user's own may draw from
            the default generators: they are seeded for it.
        takes_noise: Whether the path is noisy where sigma is above 0.
        needs_sigma: Whether sigma must be above 0.
        any_source: Whether x_0 may be other than standard normal noise.
        given_pairs: Whether x_0 and x_1 are the pairs of a finished run (--reflow-from).
    """

    path: Path
    couple: Coupling | None = None
    takes_noise: bool = True
    needs_sigma: bool = False
    any_source: bool = True
    given_pairs: bool = False


def icfm_path(
    x_0: Tensor, x_1: Tensor, t: Tensor, sigma: float, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) x_0 + t x_1 + σ ε,  dx_t = x_1 - x_0."""
    x_t = x_0.lerp(x_1, t)
    return x_t if noise is None else x_t + sigma * noise, x_1 - x_0


def fm_path(
    x_0: Tensor, x_1: Tensor, t: Tensor, sigma: float, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x_t = t x_1 + (1 - (1 - σ) t) x_0,  dx_t = x_1 - (1 - σ) x_0.

    Lipman et al. write dx_t = (x_1 - (1 - σ) x_t) / (1 - (1 - σ) t), which is the same and divides
    small by small near t = 1. There x_t has the deviation σ around x_1, and x_0 is the noise.
    """
    return t * x_1 + (1 - (1 - sigma) * t) * x_0, x_1 - (1 - sigma) * x_0


def sbcfm_path(
    x_0: Tensor, x_1: Tensor, t: Tensor, sigma: float, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) x_0 + t x_1 + σ √v ε,  dx_t = x_1 - x_0 + σ (1 - 2t) / (2 √v) ε,  v = t(1 - t).

    A Brownian bridge. The second term of the velocity has an infinite variance over uniform times
    (as ∫ (1 - 2t)² / 4v dt has no end), so that in it v is at least LEAST_VARIANCE: the target is
    smaller than the bridge's in the first and the last ten-thousandth of the time, where its
    factor is 50 σ at most.
    """
    assert noise is not None  # sigma is above 0
    variance = t * (1 - t)
    drift = sigma * (0.5 - t) * variance.clamp(min=LEAST_VARIANCE).rsqrt()
    return x_0.lerp(x_1, t) + sigma * variance.sqrt() * noise, x_1 - x_0 + drift * noise


def vpcfm_path(
    x_0: Tensor, x_1: Tensor, t: Tensor, sigma: float, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x_t = cos(πt/2) x_0 + sin(πt/2) x_1 + σ ε,  dx_t = π/2 (cos(πt/2) x_1 - sin(πt/2) x_0)."""
    # The cosine as a sine: in floating point, that of π/2 is not zero.
    cosine, sine = (math.pi / 2 * (1 - t)).sin(), (math.pi / 2 * t).sin()
    x_t = cosine * x_0 + sine * x_1
    dx_t = math.pi / 2 * (cosine * x_1 - sine * x_0)
    return x_t if noise is None else x_t + sigma * noise, dx_t


FLOWS = {
    "icfm": Flow(icfm_path),
    "otcfm": Flow(icfm_path, couple=exact),
    "fm": Flow(fm_path, takes_noise=False, any_source=False),
    "sbcfm": Flow(sbcfm_path, couple=entropic, needs_sigma=True),
    "vpcfm": Flow(vpcfm_path),
    "reflow": Flow(icfm_path, any_source=False, given_pairs=True),
}
# They draw from their seed alone.
BUILT_IN_COUPLINGS = (exact, entropic)


def flow_of(config: TrainingConfig) -> Flow:
    """The flow of `--flow`; one of the user's own is imported.

    Raises:
        ConfigError: There is no such flow, or it cannot be used with this config.
    """
    flow = FLOWS.get(config.flow_path) or _own_flow(config)
    _check_with(flow, config)
    return flow


def is_built_in(config: TrainingConfig) -> bool:
    """Whether the flow is one of flowjobs' own, which draw from no default generator."""
    return config.flow_path in FLOWS


def may_couple(flow: str) -> bool:
    """Whether a flow pairs the rows of a batch, as far as its name says: one's own may."""
    found = FLOWS.get(flow.rpartition("=")[2])
    return found is None or found.couple is not None


def may_be_given_pairs(flow: str) -> bool:
    """Whether a flow trains on the pairs of a finished run; see `may_couple`."""
    found = FLOWS.get(flow.rpartition("=")[2])
    return found is None or found.given_pairs


def check_flow(config: TrainingConfig) -> None:
    """Raise a ConfigError where a flow cannot be used with this config. Imports no user code."""
    if ":" in config.flow:
        check_module("--flow", config.flow)
        check_flow_source(config)
    if flow := FLOWS.get(config.flow_path):
        _check_with(flow, config)


def _check_with(flow: Flow, config: TrainingConfig) -> None:
    name = config.flow_label
    if flow.needs_sigma and config.sigma == 0:
        raise ConfigError(
            f"--sigma: found {config.sigma}, expected more than 0 with --flow {name}: it is the "
            "deviation of the bridge, and decides the plan (0.1, say)"
        )
    if not flow.any_source and config.source != "normal":
        raise ConfigError(
            f"--source: found {config.source}, expected normal with --flow {name}, whose source is "
            "noise by definition; icfm, otcfm, sbcfm and vpcfm take any"
        )
    if flow.given_pairs and config.reflow_from is None:
        raise ConfigError(
            f"--reflow-from: found none, expected a finished run with --flow {name}, which "
            "straightens its pairs of noise and sample"
        )
    if config.reflow_from is not None and not flow.given_pairs:
        raise ConfigError(
            f"--reflow-from: found {config.reflow_from}, and --flow {name} makes its own pairs: "
            "leave it out"
        )
    if config.ot_batch is not None and flow.couple is None:
        raise ConfigError(
            f"--ot-batch: found {config.ot_batch}, and --flow {name} pairs no batch: leave it out"
        )


def _own_flow(config: TrainingConfig) -> Flow:
    found = imported("--flow", config.flow_path)
    if isinstance(found, Flow):
        for what, given in (("path", found.path), ("couple", found.couple or exact)):
            if not callable(given):
                raise ConfigError(
                    f"--flow {config.flow}: its {what} is a {type(given).__name__}, expected a "
                    "function"
                )
        _check_call(found.path, f"--flow {config.flow}: its path", PATH)
        _check_call(found.couple or exact, f"--flow {config.flow}: its couple", COUPLE)
        return found
    if inspect.isfunction(found):
        _check_call(found, f"--flow {config.flow}", PATH)
        return Flow(found)
    raise ConfigError(
        f"--flow {config.flow}: found a {type(found).__name__}, expected a path, as a function of "
        "(x_0, x_1, t, sigma, noise) that returns (x_t, dx_t), or a flowjobs.flows.flow.Flow"
    )


def _check_call(function: Callable[..., object], what: str, arguments: Sequence[str]) -> None:
    with contextlib.suppress(ValueError):  # one that is not Python's does not say what it takes
        check_binds(inspect.signature(function), what, arguments)
