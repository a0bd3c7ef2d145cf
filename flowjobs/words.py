"""Counts, sizes and lists of names, as texts for people have them."""

from collections.abc import Sequence


def counted(n: int, what: str = "run") -> str:
    """ "1 run", "2 runs"."""
    return f"{n} {what}{'s' if n != 1 else ''}"


def first_of(names: Sequence[str], at_most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{', '.join(names[:at_most])}{more}"


def bytes_words(n: int) -> str:
    """ "40.1 MB", "1.2 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= 0.9995 * size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1e3:.3g} kB"
