"""A digest of a model's code, by which a run from Python notices that a cell was edited.

It is taken from what Python has compiled, not from the source: a notebook's class has no file, and
a file may have been edited since it was imported. Comments and docstrings do not count, nor do
values, installed packages and what is called by way of a module (`ops.scaled`).
"""

import dis
import functools
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
    """Digest the classes of a model's parts, the functions that they hold, and what these call."""
    parts = [*uncompiled(model).modules()]
    said = {repr([type(part).__qualname__ for part in parts])}
    ahead: list[object] = [of for part in parts for of in (type(part), *vars(part).values())]
    seen: set[int] = set()
    while ahead:
        of = ahead.pop()
        if isinstance(of, (staticmethod, classmethod)):
            of = of.__func__
        elif isinstance(of, property):
            of = of.fget
        elif isinstance(of, functools.cached_property):
            of = of.func
        if id(of) in seen or not isinstance(of, (type, FunctionType, BuiltinFunctionType)):
            continue
        seen.add(id(of))
        said.add(of.__qualname__)
        if isinstance(of, FunctionType):
            ahead.append(getattr(of, "__wrapped__", None))  # by a library's decorator
            if _is_users(of.__code__.co_filename):
                defaults = (*(of.__defaults__ or ()), *(of.__kwdefaults__ or {}).values())
                plain = [value for value in defaults if isinstance(value, PLAIN)]
                said.add(repr((_text(of.__code__), plain)))
                ahead += _named_by(of)
        elif isinstance(of, type) and _is_users(_file_of(of)):
            ahead += [*of.__bases__, *vars(of).values()]
    # Each version of Python compiles in its own way, and each of this module digests in its own.
    version = f"1-{sys.version_info.major}.{sys.version_info.minor}"
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


def _text(code: CodeType) -> list[object]:
    """What it does, step by step; a docstring is in none."""
    return [
        (of.co_qualname, [(step.opname, _word(step.argval)) for step in dis.get_instructions(of)])
        for of in _with_inner(code)
    ]


def _word(value: object) -> object:
    if isinstance(value, CodeType):
        return value.co_qualname
    # A set has another order in each process.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """With its lambdas, inner functions and comprehensions."""
    yield code
    for of in code.co_consts:
        if isinstance(of, CodeType):
            yield from _with_inner(of)


def _named_by(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            yield cell.cell_contents
    for code in _with_inner(function.__code__):
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_GLOBAL":
                yield function.__globals__.get(step.argval)
