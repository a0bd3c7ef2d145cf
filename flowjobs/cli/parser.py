"""How tyro reads our dataclasses from a command line, and shows them in --help."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from flowjobs.config import SlurmConfig
from flowjobs.field_values import KeyValues, flag
from flowjobs.nearest import did_you_mean

# A switch without its negative (--no-json).
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]

# "Partition of the job; default: the cluster's." says in words what None stands for.
DEFAULT_IN_WORDS = re.compile(r"[;,] default: ([^;]+?)\.(?= |$)")


class ParserExit(SystemExit):
    """The arguments were no command, or asked for help; what there is to say is printed."""


def read_command_line(command: Any, prog: str, arguments: Sequence[str], **options: Any) -> Any:
    """The command with its arguments in place.

    Raises:
        ParserExit: They are no command, or ask for help.
    """
    shown, errors = _Captured(), _Captured()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
            return tyro.cli(
                command,
                prog=prog,
                args=_joined(arguments, _flags_of_several(command)),
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.DisallowNone,
                ),
                registry=_registry(),
                **options,
            )
    except SystemExit as ended:
        raise ParserExit(ended.code) from None
    finally:
        if text := shown.getvalue():
            print(_wrapped(text), end="")
        if text := errors.getvalue():
            print(text if sys.stderr.isatty() else _plain(text), end="", file=sys.stderr)


def _joined(words: Sequence[str], several: set[str]) -> list[str]:
    """The words with all values of a flag of several that is given twice after its last occurrence.

    tyro itself drops those of the first. After the last, since a positional may end the line.
    """
    end = words.index("--") if "--" in words else len(words)
    options: list[list[str]] = [[]]  # positionals may come before the first
    for word in words[:end]:
        if re.match("--?[A-Za-z]", word):
            options.append([])
        options[-1].append(word)
    joined: dict[object, list[str]] = {}
    for place, option in enumerate(options):
        name, equals, value = "".join(option[:1]).partition("=")
        name = name.replace("_", "-")
        key = name if name in several else place
        values = [value, *option[1:]] if equals else option[1:]
        joined[key] = [*joined.pop(key), *values] if key in joined else option
    return [*itertools.chain.from_iterable(joined.values()), *words[end:]]


def _flags_of_several(command: Any) -> set[str]:
    """The flags of a command that take several values, also those of its parts."""
    flags: set[str] = set()
    if not dataclasses.is_dataclass(command):  # all commands, to be listed
        return flags
    for name, hint in get_type_hints(command, include_extras=True).items():
        annotated = get_origin(hint) is Annotated
        kind, *notes = get_args(hint) if annotated else (hint,)
        # tyro.conf.arg(name="with")
        names = [note.name for note in notes if getattr(note, "name", None)]
        options = get_args(kind) if get_origin(kind) is Union else (kind,)
        if any(get_origin(option) is tuple or option is KeyValues for option in options):
            flags.add(flag(names[0] if names else name))
        flags |= _flags_of_several(kind)
    return flags


class _Captured(io.StringIO):
    """What tyro prints: coloured where the output is a terminal, in boxes where it is UTF-8."""

    encoding = property(lambda self: sys.__stdout__.encoding if sys.__stdout__ else "utf-8")

    def isatty(self) -> bool:
        # tyro itself looks at TERM alone.
        plain = os.environ.get("NO_COLOR")
        return bool(sys.__stdout__ and sys.__stdout__.isatty() and not plain)


def _wrapped(text: str) -> str:
    """The text with its long lines broken at words, which tyro does in its boxes alone."""
    width = shutil.get_terminal_size().columns
    lines = (
        [line] if _plain(line)[:1] in ("│", "╭", "╰", " ") else textwrap.wrap(line, width) or [""]
        for line in text.splitlines()
    )
    return "".join(f"{line}\n" for some in lines for line in some)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.primitive_rule(_key_values)
    registry.primitive_rule(_choice)
    registry.primitive_rule(_path)
    registry.primitive_rule(_number)
    registry.primitive_rule(_several)
    registry.struct_rule(_options)
    return registry


def _key_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[KeyValues] | None:
    return _key_values_spec(as_typed=False) if info.type is KeyValues else None


def _key_values_spec(*, as_typed: bool) -> PrimitiveConstructorSpec[KeyValues]:
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE",
        instance_from_str=lambda words: KeyValues.parse(words, as_typed=as_typed),
        is_instance=lambda value: isinstance(value, KeyValues),
        str_from_instance=lambda values: [f"{key}={value}" for key, value in values.items()],
    )


def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """A Literal, as tyro has it, but for the error."""
    if get_origin(info.type) is not Literal:
        return None
    choices = get_args(info.type)

    def chosen(words: list[str]) -> str:
        if words[0] in choices:
            return words[0]
        raise ValueError(
            f"found {words[0]!r}, expected one of {', '.join(choices)}"
            f"{did_you_mean(words[0], choices)}"
        )

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=chosen,
        is_instance=lambda value: value in choices,
        str_from_instance=lambda value: [value],
    )


def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """A path, as tyro has it, but for an empty one: that is a variable that is not set."""
    if info.type is not Path:
        return None

    def given(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("found '', expected a path")
        return Path(words[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=given,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A number, or none where that is a choice, as tyro has it, but for the error."""
    options = get_args(info.type) if get_origin(info.type) is Union else (info.type,)
    kinds = [option for option in options if option is not type(None)]
    if kinds not in ([int], [float]):
        return None
    is_optional, kind = len(options) > 1, kinds[0]

    def given(words: list[str]) -> int | float | None:
        if is_optional and words[0] == "None":
            return None
        try:
            return kind(words[0])  # type: ignore[no-any-return]
        except ValueError:
            raise ValueError(_no_number(words[0], kind)) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=given,
        is_instance=lambda value: (
            value is None if is_optional and value is None else type(value) in (int, kind)
        ),
        str_from_instance=lambda value: [str(value)],
    )


def _no_number(word: str, kind: type) -> str:
    text = f"found {word!r}, expected a {'whole ' if kind is int else ''}number"
    if re.fullmatch(r"[\d.]+ *[A-Za-z]+", word):
        return f"{text} without a unit: the option has its own (see --help)"
    if "," in word:
        return f"{text}; several values are separated by spaces: {' '.join(word.split(','))}"
    return text


def _several(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Several numbers or choices, as tyro has them, but for the error: it says which one is bad."""
    of = get_args(info.type)
    if get_origin(info.type) is not tuple or of[1:] != (Ellipsis,):
        return None
    one = PrimitiveTypeInfo.make(of[0], info.markers)
    spec = _number(one) or _choice(one)
    if spec is None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{spec.metavar} [{spec.metavar} ...]]",
        instance_from_str=lambda words: tuple(spec.instance_from_str([word]) for word in words),
        is_instance=lambda value: isinstance(value, tuple) and all(map(spec.is_instance, value)),
        str_from_instance=lambda values: [str(value) for value in values],
    )


def _options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass of ours: help without the line ends of its source, and each default once."""
    ours = isinstance(info.type, type) and info.type.__module__.startswith("flowjobs.")
    if not (ours and dataclasses.is_dataclass(info.type)):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    fields = []
    for field in dataclasses.fields(info.type):
        hint, default = hints[field.name], _default_of(field, info.default)
        text = None
        if (info.type, field.name) == (SlurmConfig, "sbatch"):
            hint = Annotated[hint, _key_values_spec(as_typed=True)]
        if not dataclasses.is_dataclass(hint):  # a part of the config has a docstring of its own
            text = functools.partial(_help_of, info.type, field.name)
            shown = functools.partial(_shown_default, info.type, field.name, default)
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint=shown)]
        fields.append(StructFieldSpec(field.name, hint, default, text))
    return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))


def _default_of(field: dataclasses.Field[Any], instance: Any) -> Any:
    if dataclasses.is_dataclass(instance):
        return getattr(instance, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING


def _help_of(cls: type, name: str) -> str:
    return DEFAULT_IN_WORDS.sub(".", _docstrings(cls)[name])


def _shown_default(cls: type, name: str, default: Any, label: str) -> str:
    in_words = DEFAULT_IN_WORDS.search(_docstrings(cls)[name])
    if in_words and (default is None or not label or in_words[1].startswith("$")):
        return f"(default: {in_words[1]})"
    # What is off unless it is given, or empty, needs no word.
    return "" if default is None or default is False or not label else f"(default: {label})"


@functools.cache
def _docstrings(cls: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, each on one line."""
    cls = getattr(cls, "HELP_OF", cls)  # one made at run time has no source
    owners = [owner for owner in reversed(cls.__mro__) if dataclasses.is_dataclass(owner)]
    return {
        name: text
        for owner in owners
        for name, text in _docstrings_in(owner.__module__)[owner.__name__].items()
    }


@functools.cache
def _docstrings_in(module: str) -> dict[str, dict[str, str]]:
    """Those of all classes at the top of a module, by class and field."""
    # Not docstring_parser: it parses the file anew for each class, for half of --help's time.
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        statement.name: dict(_documented(statement.body))
        for statement in tree.body
        if isinstance(statement, ast.ClassDef)
    }


def _documented(statements: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, following in itertools.pairwise(statements):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, " ".join(text.split())
