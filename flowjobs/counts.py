"""Large numbers as people write them: 500k, 2M, 1_000_000."""

import math
import re

FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}


def parse_count(text: str) -> int | None:
    """`"1.5k"` -> 1500; None for what is no such number, as a share is not (`"0.8"`, `"1.0"`)."""
    found = re.fullmatch(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+(?=[km]))?)([km]?)", text.lower())
    number = round(float(found[1]) * FACTORS[found[2]], 3) if found else math.inf
    return int(number) if number.is_integer() else None


def count_words(number: int) -> str:
    """`1994752` -> `"1.99M"`."""
    for suffix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{suffix}"
    return str(number)
