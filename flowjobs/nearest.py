"""What a mistyped word may have meant, for the texts of errors."""

from collections.abc import Collection
from difflib import get_close_matches

# More names than these tell a reader nothing.
LIST_AT_MOST = 6


def meant(word: str, known: Collection[str], what: str) -> str:
    """The few names that `word` may stand for, and how many there are.

    Args:
        word: What was found.
        known: The names that there are.
        what: What they are called ("runs").
    """
    there = f"there are {len(known)} {what}"
    if not known:
        return f"there are no {what} yet"
    if len(known) == 1:
        return f"there is only {next(iter(known))}"
    if len(known) <= LIST_AT_MOST:
        return f"{there}: {', '.join(sorted(known))}{did_you_mean(word, known)}"
    if near := _nearest(word, known):
        return f"did you mean {' or '.join(near)}? ({there})"
    return f"{there}, none of that name or nearly so"


def did_you_mean(word: str, known: Collection[str]) -> str:
    """ "; did you mean NAME?" to add to a text that lists what there is, or ""."""
    parts = word.split(",")
    if len(parts) > 1 and any(part in known for part in parts):
        return f"; several values are separated by spaces: {' '.join(parts)}"
    near = _nearest(word, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _nearest(word: str, known: Collection[str]) -> list[str]:
    by_lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), by_lower, n=3)
    # The beginning of a longer name, as one types it.
    begun = [name for name in sorted(by_lower) if name.startswith(word.lower())][:3] if word else []
    return [by_lower[name] for name in dict.fromkeys([*near, *begun])][:3]
