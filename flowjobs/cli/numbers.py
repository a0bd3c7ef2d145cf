"""Checks of numbers that are given on the command line."""

import threading

from flowjobs.errors import ConfigError
from flowjobs.field_values import flag


def check_counts(**counts: int | None) -> None:
    """Raise a ConfigError for an option that counts something, by its field, and is below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag(name)}: found {value}, expected at least 1")


def check_seconds(option: str, seconds: float) -> None:
    """Raise a ConfigError unless one can wait so long."""
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ConfigError(f"{option}: found {seconds:g}, expected a number of seconds above 0")
