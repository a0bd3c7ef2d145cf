"""A digest of a model's code, by which a run from Python notices that a cell was edited.

Of what Python has compiled and not of the source: a notebook's class has no file, and a file may
have been edited since it was imported. Comments do not count, nor do values and installed packages.
"""

import dis
import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType

from torch import nn

from flowjobs.models.build import uncompiled
from flowjobs.user_code import OURS, is_installed

PLAIN = (int, float, str)


def code_digest(model: nn.Module) -> str:
    """Of the classes of a model's parts, the functions that they hold, and what these call."""
    parts = [*uncompiled(model).modules()]
    said = {repr([type(part).__qualname__ for part in parts])}
    ahead: list[object] = [of for part in parts for of in (type(part), *vars(part).values())]
    seen: set[int] = set()
    while ahead:
        of = ahead.pop()
        if isinstance(of, (staticmethod, classmethod)):
            of = of.__func__
        if id(of) in seen or not isinstance(of, (type, FunctionType, BuiltinFunctionType)):
            continue
        seen.add(id(of))
        said.add(of.__qualname__)
        if isinstance(of, FunctionType):
            ahead.append(getattr(of, "__wrapped__", None))  # by a library's decorator
            if _is_users(of.__code__.co_filename):
                plain = [value for value in of.__defaults__ or () if isinstance(value, PLAIN)]
                said.add(repr((_text(of.__code__), plain)))
                ahead += _named_by(of)
        elif isinstance(of, type) and _is_users(_file_of(of)):
            ahead += [*of.__bases__, *vars(of).values()]
    # Each version of Python compiles in its own way.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{version}:{hashlib.sha256(repr(sorted(said)).encode()).hexdigest()[:16]}"


def differ(before: str, now: str) -> bool:
    """Whether two digests are surely of different code."""
    return before.partition(":")[0] == now.partition(":")[0] and before != now


def _file_of(cls: type) -> str:
    if cls.__module__ == "__main__":
        return ""  # its __file__ may be that of the package which Python was started with
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or ""


def _is_users(file: str) -> bool:
    return not (is_installed(Path(file)) or Path(file).is_relative_to(OURS))


def _text(code: CodeType) -> tuple[object, ...]:
    constants = [
        # A set has another order in each process.
        sorted(map(repr, of)) if isinstance(of, frozenset) else repr(of)
        for of in code.co_consts
        if not isinstance(of, CodeType)
    ]
    inner = [_text(of) for of in code.co_consts if isinstance(of, CodeType)]
    return code.co_qualname, code.co_code, code.co_names, constants, inner


def _named_by(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            yield cell.cell_contents
    for step in dis.get_instructions(function.__code__):
        if step.opname == "LOAD_GLOBAL":
            yield function.__globals__.get(step.argval)
