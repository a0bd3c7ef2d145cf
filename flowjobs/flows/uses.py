"""Which fields of a config a run's flow, times and augmentation have a use for. Loads no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.field_values import flag
from flowjobs.flows.flow import may_be_given_pairs, may_couple

# For each field, the one that decides whether it has a use, and for which values.
_DECIDED_BY: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "ot_batch": ("flow", may_couple),
    "reflow_from": ("flow", may_be_given_pairs),
    "aug_strength": ("aug", lambda aug: bool(aug != "none")),
    "time_mean": ("time_sampling", lambda times: bool(times == "logit-normal")),
    "time_std": ("time_sampling", lambda times: bool(times == "logit-normal")),
}


def has_use(field: str, of: Callable[[str], Any]) -> bool:
    """Whether a run has a use for a field (those of its model aside).

    Args:
        field: Its name.
        of: The value of another field, by its name.
    """
    if field not in _DECIDED_BY:
        return True
    decides, uses = _DECIDED_BY[field]
    return uses(of(decides))


def check_uses(config: TrainingConfig) -> None:
    """Raise a ConfigError for a field that is given and does nothing: something else was meant."""
    given = vars(config)
    for field, (decides, uses) in _DECIDED_BY.items():
        if given[field] != getattr(TrainingConfig, field) and not uses(given[decides]):
            raise ConfigError(
                f"{flag(field)}: found {given[field]} with {flag(decides)} {given[decides]}, which "
                f"has no use for it: leave it out, or give another {flag(decides)}"
            )
