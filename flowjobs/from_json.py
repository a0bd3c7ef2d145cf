"""Dataclasses from what a JSON file has of them, each value of its field's type.

pydantic does this too; its import takes longer than all that the command line imports.
"""

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

Record = TypeVar("Record")


def from_json(cls: type[Record], found: Any) -> Record:
    """A dataclass from an object of JSON; fields of a newer version are left out.

    Raises:
        ValueError: A field is missing, or of another type.
    """
    if not isinstance(found, dict):
        raise ValueError(f"found {found!r}, expected an object")
    hints, needed = fields_of(typing.cast(Any, cls))
    if missing := needed - found.keys():
        raise ValueError(f"found no {', '.join(sorted(missing))}")
    values = {}
    for name in hints.keys() & found.keys():
        try:
            values[name] = value_from_json(hints[name], found[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return cls(**values)


def value_from_json(hint: Any, found: Any) -> Any:
    """A value of a type that dataclasses have, from JSON.

    Raises:
        ValueError: It is of another type.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(ValueError):
                return value_from_json(option, found)
    elif origin in (list, tuple) and isinstance(found, list):
        return origin(value_from_json(options[0], each) for each in found)
    elif origin in (dict, Mapping) and isinstance(found, dict):
        return {name: value_from_json(options[1], each) for name, each in found.items()}
    elif dataclasses.is_dataclass(hint):
        return from_json(typing.cast(Any, hint), found)
    elif isinstance(hint, type) and issubclass(hint, dict) and isinstance(found, dict):
        return hint(found)
    elif (
        hint is Any
        or type(found) is hint
        or (hint is float and type(found) is int)  # kept, so that it is written as it was
        or (origin is Literal and found in options)
    ):
        return found
    raise ValueError(f"found {found!r}, expected {getattr(hint, '__name__', hint)}")


@functools.cache
def fields_of(cls: Any) -> tuple[dict[str, Any], set[str]]:
    """The types of a dataclass's fields by their names, and those that have no default."""
    fields = dataclasses.fields(cls)
    missing = dataclasses.MISSING
    needed = {each.name for each in fields if each.default is each.default_factory is missing}
    return typing.get_type_hints(cls), needed
