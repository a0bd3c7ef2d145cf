"""Values of a TOML file, as the fields of a config hold them."""

import os
import re
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from flowjobs.config import is_path
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues
from flowjobs.runs.run import absolute

# What stands for None, as on the command line: TOML has no word for it.
NO_VALUE = "None"
# A word without quotes: `partition = preempt`.
_BARE_WORD = re.compile(r"\s*([\w.\"'-]+)\s*=\s*([^\s\"'#\[{][^\"'#\[{]*?)\s*(?:#.*)?")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors may write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        at = re.search(r"at line (\d+)", str(error))
        line = text.splitlines()[int(at[1]) - 1] if at else ""
        if (found := _BARE_WORD.fullmatch(line)) and "Invalid value" in str(error):
            raise ConfigError(
                f'{path}, line {at[1] if at else ""}: text needs quotes: {found[1]} = "{found[2]}"'
            ) from error
        raise ConfigError(f"{path}: {error}") from error


def typed_value(name: str, value: Any, hint: Any, folder: Path) -> Any:
    """A value of a TOML file as the field of that name holds it.

    Args:
        name: The field's.
        value: As it was read.
        hint: The field's type; Any: of those that JSON has.
        folder: Where a relative path begins.

    Raises:
        TypeError: It is of another type.
    """
    options = get_args(hint) if get_origin(hint) is typing.Union else (hint,)
    if value == NO_VALUE and types.NoneType in options:
        return None
    for option in options:
        if option is Any:
            return _json_of(value)
        if option is KeyValues and isinstance(value, dict):
            return KeyValues(_json_of(value))
        if option is Path and isinstance(value, str):
            return absolute(folder / os.path.expanduser(value))
        if isinstance(value, str) and is_path(name, value):
            return str(absolute(folder / os.path.expanduser(value)))
        if option is float and type(value) is int and abs(value) <= sys.float_info.max:
            return float(value)
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if isinstance(option, type) and type(value) is option:
            return value
    expected = " or ".join(
        ", ".join(get_args(option)) if get_origin(option) is Literal else option.__name__
        for option in options
        if option is not types.NoneType
    )
    raise TypeError(f"{value!r}, expected {expected}")


def _json_of(value: Any, where: str = "") -> Any:
    """A value of a TOML file as JSON has it; a TypeError if it is a date or a time."""
    match value:
        case dict():
            return {key: _json_of(each, f"{where}{key} = ") for key, each in value.items()}
        case list():
            return [_json_of(each, where) for each in value]
        case str() | bool() | int() | float():
            return None if value == NO_VALUE else value
        case _:
            raise TypeError(
                f"{where}{value}, expected text (in quotes), a number, true, false, or a list or "
                "table of these"
            )
