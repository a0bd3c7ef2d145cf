"""Samples of a trained model: points of the source that follow its velocity from t = 0 to t = 1."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowjobs.data.randomness import seeded
from flowjobs.data.source import Source
from flowjobs.errors import SamplingError
from flowjobs.evaluation.solver import Solver
from flowjobs.models.velocity import Velocity, checked_velocity, input_dtype

# Samples are computed this many at once, always: the kernel of a matrix product, and so the last
# bits, depend on the number of rows, and dopri5 takes one step size for all of them.
CHUNK = 256
# A field that is not smooth has dopri5 take ever smaller steps.
MAX_ADAPTIVE_STEPS = 2000

# torchdiffeq's names. Its heun2 is the explicit trapezoidal rule, its rk4 the 3/8 rule.
_METHODS = {"heun": "heun2"}


@dataclass(frozen=True)
class Solution:
    """Where a batch of points ends.

    Attributes:
        x_1: The points at t = 1, of the shape of those at t = 0.
        nfe: How often the network was called.
        path_energy: The integral of the squared velocity along each path, shape (batch,), if it
            was asked for.
    """

    x_1: Tensor
    nfe: int
    path_energy: Tensor | None = None


@dataclass(frozen=True)
class Samples:
    """Some samples, on the CPU.

    Attributes:
        x_0: The points of the source that they come from, of the shape of `x_1`, float32.
        x_1: The samples in the data's own units, shape (n, *shape), of the type of the stats.
        nfe: Network calls that each of them took; with dopri5 a mean over the chunks.
        path_energy: See `Solution`; in the model's units, where the data are normalized.
    """

    x_0: Tensor
    x_1: Tensor
    nfe: float
    path_energy: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_1)


@torch.no_grad()
def integrate(
    velocity: Velocity,
    x_0: Tensor,
    solver: Solver,
    *,
    with_energy: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Solution:
    """Follow a velocity from t = 0 to t = 1 with one of torchdiffeq's solvers.

    Args:
        velocity: A function of x, of shape (batch, *shape), and t, of shape (batch,).
        x_0: The points at t = 0.
        solver: Which solver, and how fine.
        with_energy: Integrate the squared velocity along the paths too.
        check: Called before each network call; what it raises ends it.

    Raises:
        SamplingError: dopri5 does not get to the end.
    """
    from torchdiffeq import odeint  # loads scipy, which the start of a run does without

    nfe = 0

    def counted(t: Tensor, x: Tensor) -> Tensor:
        nonlocal nfe
        check()
        nfe += 1
        # dopri5 looks ahead to choose its first step, and a model knows no time after 1.
        t = t.clamp(max=1.0)
        # In memory of their own, which a model may change: the solver keeps x.
        return velocity(x.clone(), t.expand(len(x)).clone())

    def with_power(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        dx_t = counted(t, state[0])
        return dx_t, dx_t.flatten(1).square().sum(1)

    grid = torch.linspace(0.0, 1.0, solver.steps + 1, device=x_0.device, dtype=x_0.dtype)
    options: dict[str, Any] = (
        # It would step beyond t = 1, where nothing was trained, and interpolate backwards.
        {"max_num_steps": MAX_ADAPTIVE_STEPS, "step_t": grid[-1:]}
        if solver.adaptive
        # Not `step_size`, of which rounding makes a step too many.
        else {"grid_constructor": lambda func, y0, t: grid}
    )
    arguments = {
        "t": grid[[0, -1]],
        "method": _METHODS.get(solver.method, solver.method),
        "options": options,
        "rtol": solver.tolerance,
        "atol": solver.tolerance,
    }
    try:
        if with_energy:
            if solver.adaptive:  # its steps are those that it takes without
                options["norm"] = lambda state: state[0].abs().square().mean().sqrt()
            x, energy = odeint(with_power, (x_0, x_0.new_zeros(len(x_0))), **arguments)
            return Solution(x[-1], nfe, energy[-1])
        return Solution(odeint(counted, x_0, **arguments)[-1], nfe)
    except AssertionError as error:  # how torchdiffeq says it
        if not solver.adaptive:
            raise
        raise SamplingError(
            f"{solver.method} does not reach t = 1 after {nfe} network calls ({error}): the "
            f"velocity is not smooth enough for a tolerance of {solver.tolerance:g}; give a larger "
            "--tolerance, or a solver of fixed steps (--solver midpoint)"
        ) from error


def sample_chunks(
    model: nn.Module,
    n: int,
    stats: Mapping[str, Tensor],
    device: torch.device,
    seed: int,
    solver: Solver,
    *,
    source: Source,
    with_energy: bool = False,
    check: Callable[[], None] = lambda: None,
    first: int = 0,
    at_once: int = CHUNK,
) -> Iterator[Samples]:
    """Draw n samples of a model, at most CHUNK at a time.

    A sample depends on the seed and its index alone, to the last bit on the same hardware: not on
    n, nor on the others.

    Args:
        model: The velocity, on `device`.
        n: How many samples.
        stats: Normalization of the data, which is undone: `mean` and `std` of a row's shape.
        device: Where to compute.
        seed: Seed of the source, which is drawn on the CPU: it is the same on any device.
        solver: How to integrate.
        source: Where the paths start, in normalized units.
        with_energy: Integrate the squared velocity along the paths too.
        check: Called before each network call; what it raises ends the samples.
        first: Leave out so many chunks of the n samples, which are there already.
        at_once: Rows that the model is called on, at most; the last bits depend on it.

    Raises:
        SamplingError: A sample is not finite, or dopri5 does not get to the end.
    """
    mean, std = stats["mean"].to(device), stats["std"].to(device)
    checked = checked_velocity(model, input_dtype(model), type(model).__name__)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        found = torch.empty_like(x)
        parts = zip(*(torch.split(of, at_once) for of in (x, t, found)), strict=True)
        for points, times, velocities in parts:
            # At once: the model may write to the same memory again, and the solver keeps it.
            velocities.copy_(checked(points, times))
        return found

    for chunk, start in enumerate(range(first * CHUNK, n, CHUNK), first):
        x_0 = source.starts(seed, chunk, CHUNK)
        with seeded(device, seed, "model", chunk):  # for a model that draws random numbers
            found = integrate(
                velocity, x_0.to(device), solver, with_energy=with_energy, check=check
            )
        asked = slice(min(CHUNK, n - start))
        x_1 = (found.x_1 * std + mean)[asked].cpu()
        if not bool(torch.isfinite(x_1).all()):
            raise SamplingError(
                f"sample {start + int((~torch.isfinite(x_1.flatten(1)).all(1)).nonzero()[0])} is "
                f"not finite ({solver}): the velocity grows too fast; more --steps may help"
            )
        energy = None if found.path_energy is None else found.path_energy[asked].cpu()
        yield Samples(x_0[asked], x_1, found.nfe, energy)


def joined(parts: list[Samples]) -> Samples:
    """Several chunks as one."""
    energies = [part.path_energy for part in parts if part.path_energy is not None]
    return Samples(
        torch.cat([part.x_0 for part in parts]),
        torch.cat([part.x_1 for part in parts]),
        sum(part.nfe for part in parts) / len(parts),
        torch.cat(energies) if energies else None,
    )
