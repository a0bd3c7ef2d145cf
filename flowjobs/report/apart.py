"""Which runs of a report have the same value of a field, and a word for each value.

A run's name has the file's name for a checkpoint or a file of data, and the class's for a model, so
that others may be called the same. Data and weights are known by their content, a model that was
given from Python by its class and its parameters: what else it was built with, nobody has noted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowjobs.config import DATA_FIELDS, FILE_FIELDS, PINNED
from flowjobs.report.results import Result
from flowjobs.runs.datasets import PAIRS, SOURCE

# How much of a digest is shown.
DIGITS = 8

# What a value is: digests, a class and its parameters, or as JSON has it.
Identity = tuple[str, ...]


def told_apart(results: Sequence[Result]) -> list[Result]:
    """The same runs, whose `shown` has one word for two values only if they are the same."""
    words: list[dict[str, str]] = [{} for _ in results]
    for name in dict.fromkeys(name for result in results for name in result.fields):
        found = _identities(results, name)
        called: dict[str, dict[Identity, Result]] = {}
        for result, identity in zip(results, found, strict=True):
            called.setdefault(result.in_name(name), {}).setdefault(identity, result)
        for word, those in called.items():
            if len(those) > 1:
                longer = _longer_words(name, word, those)
                for of, result, identity in zip(words, results, found, strict=True):
                    if result.in_name(name) == word:
                        of[name] = longer[identity]
    return [replace(result, words=of) for result, of in zip(results, words, strict=True)]


def _identities(results: Sequence[Result], name: str) -> list[Identity]:
    """What the value of a field is, for each run.

    Where the content was not noted (the run has not begun), it is that of another run with this
    value, if all that have one have the same.
    """
    contents = [_content(result, name) for result in results]
    if name == "arch":
        # A model's size follows from the data's, too.
        sizes: dict[tuple[str, Any], set[int | None]] = {}
        for result in results:
            of_data = result.status.model, str(result.fields.get("dataset"))
            sizes.setdefault(of_data, set()).add(result.status.parameters)
        several = {model for (model, _), some in sizes.items() if len(some) > 1}
        contents = [of if of[:1] and of[0] in several else of[:1] for of in contents]
    values = [
        # Without the digest of a pinned file, which a run that is not made yet lacks.
        json.dumps(value.partition(PINNED)[0] if isinstance(value, str) else value, sort_keys=True)
        for value in (result.fields.get(name) for result in results)
    ]
    known: dict[str, set[Identity]] = {}
    for value, content in zip(values, contents, strict=True):
        if content:
            known.setdefault(value, set()).add(content)
    alone = {value: next(iter(of)) for value, of in known.items() if len(of) == 1}
    return [
        content or alone.get(value, (value,))
        for value, content in zip(values, contents, strict=True)
    ]


def _content(result: Result, name: str) -> Identity:
    """What is noted of what a field's value names; empty where it names nothing, or none is."""
    if name == "arch" and result.status.model:
        return result.status.model, str(result.status.parameters)
    if name in DATA_FIELDS:
        return tuple(
            content.digest
            for part, content in sorted(result.data.items())
            if part.startswith(SOURCE) == (name == "source") and not part.startswith(PAIRS)
        )
    _, pinned, digest = str(result.fields.get(name)).rpartition(PINNED)
    return (digest,) if pinned else ()


def _longer_words(name: str, word: str, those: Mapping[Identity, Result]) -> Mapping[Identity, str]:
    """Words for the values that a run's name has one word for."""
    candidates = {of: _candidates(name, word, of, result) for of, result in those.items()}
    for length in range(max(map(len, candidates.values()))):
        found = {of: words[min(length, len(words) - 1)] for of, words in candidates.items()}
        if len({*found.values()}) == len(found):
            break
    return found


def _candidates(name: str, word: str, identity: Identity, result: Result) -> list[str]:
    """Words for a value, each longer than the one before; the last is its own."""
    value: Any = result.fields.get(name)
    text = str(value).partition(PINNED)[0]
    if name in FILE_FIELDS:
        parts = Path(result.run.study, text).parts  # a file may be given by all of its path
        tails = [str(Path(*parts[-length:])) for length in range(1, len(parts) + 1)]
    else:
        tails = [text]
    if name == "arch" and result.status.model:
        size = f"({result.status.parameters or 0:,} parameters)"
        return [text, f"{word} {size}", f"{text} {size}"]
    digests = ", ".join(digest[:DIGITS] for digest in _content(result, name))
    own = "not noted yet" if name in (*FILE_FIELDS, "reflow_from") else identity[0]
    return [*tails, f"{word} ({digests or own})"]
