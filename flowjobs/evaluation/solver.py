"""Which ODE solver takes samples from t = 0 to t = 1. Knows no torch: the command line reads it."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from flowjobs.errors import ConfigError
from flowjobs.formatting import counted
from flowjobs.nearest import did_you_mean

Method = Literal["euler", "midpoint", "heun", "rk4", "dopri5"]

DEFAULT_STEPS = 50
DEFAULT_TOLERANCE = 1e-4
# Where the curve over network calls is measured.
EULER_STEPS = (1, 2, 4, 8, 16, 32, 64)
# Shorter ones, in float32, are mostly rounding.
MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Solver:
    """A solver of torchdiffeq and how fine it is.

    Attributes:
        method: With a fixed number of steps: euler (order 1; 1 network call a step), midpoint and
            heun (order 2; 2 calls), rk4 (order 4; 4 calls). dopri5 (order 5) chooses its steps.
        steps: Equal steps from 0 to 1; of no effect with dopri5.
        tolerance: The error that dopri5 allows in each step, relative and absolute.
    """

    method: Method = "midpoint"
    steps: int = DEFAULT_STEPS
    tolerance: float = DEFAULT_TOLERANCE

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(
                f"--solver: found {self.method!r}, expected one of {', '.join(get_args(Method))}"
                f"{did_you_mean(str(self.method), get_args(Method))}"
            )
        check_steps("--steps", self.steps)
        is_number = isinstance(self.tolerance, Real) and math.isfinite(self.tolerance)
        if not (is_number and self.tolerance > 0):
            raise ConfigError(f"--tolerance: found {self.tolerance}, expected more than 0")

    @property
    def adaptive(self) -> bool:
        """Whether it chooses its steps itself."""
        return self.method == "dopri5"

    def __str__(self) -> str:
        if self.adaptive:
            return f"{self.method}, tolerance {self.tolerance:g}"
        return f"{self.method}, {counted(self.steps, 'step')}"


def check_steps(option: str, steps: int) -> None:
    """Raise a ConfigError for a number of steps that cannot be taken."""
    if not (isinstance(steps, Integral) and 1 <= steps <= MOST_STEPS):
        raise ConfigError(f"{option}: found {steps}, expected 1 to {MOST_STEPS}")
