"""Which fields of a config a run's flow, times and augmentation have a use for. Loads no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from flowjobs.flows.flow import may_be_given_pairs, may_couple

# The value of a field by its name.
Values = Callable[[str], Any]


def _is_logit_normal(of: Values) -> bool:
    return bool(of("time_sampling") == "logit-normal")


_USED: Mapping[str, Callable[[Values], bool]] = {
    "ot_batch": lambda of: may_couple(of("flow")),
    "reflow_from": lambda of: may_be_given_pairs(of("flow")),
    "aug_strength": lambda of: bool(of("aug") != "none"),
    "time_mean": _is_logit_normal,
    "time_std": _is_logit_normal,
}


def has_use(field: str, of: Values) -> bool:
    """Whether a run has a use for a field (those of its model aside), by its other values."""
    return field not in _USED or _USED[field](of)
