"""What the values of a config's fields may be, as they are typed, written in Python, or in JSON."""

import ast
import contextlib
import functools
import json
import numbers
import os
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from flowjobs.errors import ConfigError
from flowjobs.from_json import fields_of

# What JSON, YAML and TOML call Python's True, False and None.
JSON_WORDS = {"true": True, "false": False, "null": None}


class KeyValues(dict[str, Any]):
    """Arguments by name, given on the command line as key=value."""

    @classmethod
    def parse(cls, items: Iterable[str], *, as_typed: bool = False) -> "KeyValues":
        """`["width=512", "norm=layer"]` -> `{"width": 512, "norm": "layer"}`.

        A value is read by `literal_or_text`.

        Args:
            items: The command line's.
            as_typed: Keep the text of a number that would be written otherwise: to a program that
                takes text, as sbatch does, `2024_11_05` and `1e5` may be names.

        Raises:
            ValueError: An item is not of the form key=value.
        """
        parsed = cls()
        for item in items:
            key, equals, value = item.partition("=")
            if not (key and equals):
                raise ValueError(f"found {item!r}, expected key=value")
            parsed[key] = found = literal_or_text(value)
            if as_typed and not isinstance(found, str | bool | None) and str(found) != value:
                parsed[key] = value
        return parsed


def key_value(option: str, item: str) -> tuple[str, Any]:
    """One of an option's arguments: `width=512` -> `("width", 512)`; see `KeyValues.parse`.

    Raises:
        ConfigError: It is not of the form key=value.
    """
    try:
        ((key, value),) = KeyValues.parse([item]).items()
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error
    return key, value


def literal_or_text(text: str) -> Any:
    """What is typed as a value: a literal of Python (a tuple becomes a list) or JSON, or the text.

    true, false and null are no text, in any case, since text is true wherever a model asks; 'null'
    in quotes is. A literal that JSON does not know (a set) is text as well.
    """
    if text.lower() in JSON_WORDS:
        return JSON_WORDS[text.lower()]
    for read in (ast.literal_eval, _json_literal):
        # A key that is a list, and signs or brackets that are nested too deep: see literal_eval.
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return json.loads(json.dumps(read(text)))
    return text


def _json_literal(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is none of JSON's own")

    return json.loads(text, parse_constant=refuse)


def flag(name: str) -> str:
    """The command line's name of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def take_types(config: Any) -> None:
    """Let each field be of its type, so that JSON gives it back as it is.

    From Python a number may be numpy's or torch's, or a whole one as a float (1e2), and a file a
    Path. An int stays one where a float may be: signatures have it as it was given.

    Raises:
        ConfigError: A value means none of that type.
    """
    given, cls = vars(config), config.__class__
    for name, kinds in _kinds_of_fields(cls):
        value = given[name]
        if type(value) not in kinds or (KeyValues in kinds and value):
            object.__setattr__(config, name, _as_one_of(kinds, value, flag(name)))


@functools.cache
def _kinds_of_fields(cls: Any) -> list[tuple[str, frozenset[type]]]:
    """The types that the values of each field may have."""
    kinds = []
    for name, hint in fields_of(cls)[0].items():
        options = {str} if get_origin(hint) is Literal else {*(get_args(hint) or [hint])}
        if float in options:
            options.add(int)
        kinds.append((name, frozenset(options)))
    return kinds


def _as_one_of(kinds: frozenset[type], value: Any, option: str) -> Any:
    found = _plain(value)
    if KeyValues in kinds and isinstance(found, dict):
        try:
            return KeyValues(json.loads(json.dumps(found, default=_plain_or_none_of_json)))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{option}: {error}") from error
    if type(found) in kinds:
        return found
    if int in kinds and isinstance(found, float) and found.is_integer():
        return int(found)
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    words |= {KeyValues: "a dict", type(None): "None"}
    expected = [word for kind, word in words.items() if kind in kinds]
    if float in kinds:
        expected.remove(words[int])
    raise ConfigError(f"{option}: found {value!r}, expected {' or '.join(expected)}")


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's, and a path as text; what else there is, as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", 1) != 0:  # nor is an array of one number a number
        return value
    number = value.item()
    # 0.001 of fewer digits is meant as 0.001, which the command line would give.
    short = isinstance(number, float) and getattr(value, "itemsize", 8) < 8
    return float(str(value)) if short and isinstance(value, numbers.Number) else number


def _plain_or_none_of_json(value: Any) -> Any:
    if (found := _plain(value)) is value:
        raise TypeError(
            f"found {value!r}, expected a number, text, True, False, None, list or dict"
        )
    return found
