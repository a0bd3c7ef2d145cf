"""Numbers, sizes and lists of names as texts have them: 500k, 1.2 GB, 2 runs."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}


def parse_count(text: str) -> int | None:
    """`"1.5k"` -> 1500; None for what is no such number, as a share is not (`"0.8"`, `"1.0"`)."""
    found = re.fullmatch(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+(?=[km]))?)([km]?)", text.lower())
    number = round(float(found[1]) * FACTORS[found[2]], 3) if found else math.inf
    return int(number) if number.is_integer() else None


def format_count(number: int) -> str:
    """`1994752` -> `"1.99M"`."""
    for suffix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{suffix}"
    return str(number)


def counted(n: int, what: str = "run") -> str:
    """ "1 run", "2 runs"."""
    return f"{n} {what}{'s' if n != 1 else ''}"


def counts_of(kinds: Mapping[Any, int]) -> str:
    """ "2 failed, 1 running", sorted by their names."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


def first_of(names: Sequence[str], at_most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{', '.join(names[:at_most])}{more}"


def format_bytes(n: int) -> str:
    """ "40.1 MB", "1.2 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= 0.9995 * size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1e3:.3g} kB"


def duration_words(seconds: float | None) -> str:
    """A duration in two units at most ("2 h 10 min"); empty for None."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
