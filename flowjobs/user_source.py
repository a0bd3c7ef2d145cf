"""What the source of a user's module says of its classes and functions, read without running it.

Where it does not say for certain what there will be (a class made by a function, a decorator, a
name that is bound twice), the answer is None: nothing is refused then.
"""

import ast
import difflib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from flowjobs.errors import ConfigError
from flowjobs.formatting import first_of
from flowjobs.nearest import LIST_AT_MOST

# From one module to the next that it imports the name from.
FOLLOW_AT_MOST = 5
# With these a module may make names that its source does not show.
DYNAMIC = {"globals", "locals", "vars", "exec", "eval", "setattr"}

Statement_co = TypeVar("Statement_co", bound=ast.stmt, covariant=True)


@dataclass(frozen=True)
class Source:
    """A module's text, parsed."""

    module: str
    is_package: bool
    tree: ast.Module

    @classmethod
    def read(cls, file: Path, module: str) -> "Source | SyntaxError | None":
        """Parse a module's file; None where it cannot be read."""
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError as error:
            return error
        except (OSError, ValueError, RecursionError):
            return None
        return cls(module, file.name == "__init__.py", tree)


@dataclass(frozen=True)
class Found(Generic[Statement_co]):
    """The statement that binds a name, in the module that has it."""

    source: Source
    node: Statement_co


@dataclass(frozen=True)
class _Missing:
    """The module has no such name for certain; these statements it has."""

    statements: list[ast.stmt]


def binding_in(
    option: str, path: str, kind: type[ast.ClassDef | ast.FunctionDef]
) -> Found[ast.stmt] | None:
    """The one statement that binds the name of an import path; None where that is not certain.

    Args:
        option: That it was given to, and its value, for the error's text.
        path: `package.module:name`.
        kind: What the name should be of; the error's text lists those that there are.

    Raises:
        ConfigError: There is no such module or name for certain, or the module is no Python.
    """
    module, _, name = path.partition(":")
    try:
        file = _file_of(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{option}: {error}") from error
    source = Source.read(file, module) if file else None
    if isinstance(source, SyntaxError):
        raise ConfigError(f"{option}: {file}:{source.lineno}: {source.msg}")
    found = binding(source, name) if source else None
    if isinstance(found, _Missing):
        names = [node.name for node in found.statements if isinstance(node, kind)]
        near = difflib.get_close_matches(name, names, n=1)
        what = "classes" if kind is ast.ClassDef else "functions"
        there = f"its {what}: {first_of(names, LIST_AT_MOST) or 'none'}"
        there = f"did you mean {near[0]}?" if near else there
        raise ConfigError(f"{option}: {file} has no {name}; {there}")
    return found


def as_class(found: Found[ast.stmt] | _Missing | None) -> Found[ast.ClassDef] | None:
    """What was found, if it is a class."""
    if isinstance(found, Found) and isinstance(found.node, ast.ClassDef):
        return Found(found.source, found.node)
    return None


def method_of(found: Found[ast.ClassDef], name: str, other: str) -> inspect.Signature | None:
    """The signature of a class's method, unless the class has `other`, which may be called first.

    Of the class itself, or of the one that it inherits the method from.
    """
    looked_at: Found[ast.ClassDef] | None = found
    for _ in range(FOLLOW_AT_MOST):
        if looked_at is None:
            return None
        node = looked_at.node
        if node.decorator_list or node.keywords or _assigns(looked_at.source, name):
            return None
        bound = [s for s in _statements(node.body) if _names_bound(s) & {name, other}]
        match bound:
            case [ast.FunctionDef(name=defined) as method] if (
                defined == name and method in node.body
            ):
                return None if method.decorator_list else signature_of(method.args, is_method=True)
        if bound or len(node.bases) != 1 or not isinstance(base := node.bases[0], ast.Name):
            return None
        looked_at = as_class(binding(looked_at.source, base.id))
    return None


def signature_of(arguments: ast.arguments, *, is_method: bool = False) -> inspect.Signature:
    """The signature of a function as its source has it; of a method without `self`."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    parameters = []
    for number, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = (
            inspect.Parameter.POSITIONAL_ONLY
            if number < len(arguments.posonlyargs)
            else inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        parameters.append(_parameter(argument, kind, default))
    if arguments.vararg:
        parameters.append(_parameter(arguments.vararg, inspect.Parameter.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(_parameter(argument, inspect.Parameter.KEYWORD_ONLY, default))
    if arguments.kwarg:
        parameters.append(_parameter(arguments.kwarg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters[1:] if is_method and positional else parameters)


def binding(source: Source, name: str, followed: int = 0) -> Found[ast.stmt] | _Missing | None:
    """The one statement that binds a name, where it was imported from; None if that is unclear."""
    statements = list(_statements(source.tree.body))
    bindings = [statement for statement in statements if name in _names_bound(statement)]
    match bindings:
        case [ast.ImportFrom() as node]:
            return _imported(source, node, name, followed)
        case [node]:
            return Found(source, node)
    if bindings or _may_have_more(source.tree, statements):
        return None
    return _Missing(statements)


def _imported(
    source: Source, node: ast.ImportFrom, name: str, followed: int
) -> Found[ast.stmt] | None:
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    parts = source.module.split(".")
    base = parts[: len(parts) - node.level + source.is_package] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    try:
        file = _file_of(module) if module and followed < FOLLOW_AT_MOST else None
    except ModuleNotFoundError:
        file = None  # the import may be one that is tried
    there = Source.read(file, module) if file else None
    if not isinstance(there, Source):
        return None
    found = binding(there, original, followed + 1)
    # What is missing there may be a module of that package.
    return found if isinstance(found, Found) else None


def _file_of(module: str) -> Path | None:
    """The source of a module, found without importing what it is in; None if that is not certain.

    Raises:
        ModuleNotFoundError: There is no such module in a package that shows what is in it.
    """
    package, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not parts:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for number, part in enumerate(parts):
        packages = [folder / part for folder in folders if (folder / part).is_dir()]
        files = [folder / f"{part}.py" for folder in folders if (folder / f"{part}.py").is_file()]
        is_last = number == len(parts) - 1
        if is_last and files and not packages:
            return files[0]
        if is_last and packages and (packages[0] / "__init__.py").is_file():
            return packages[0] / "__init__.py"
        if not packages and folders and not _has_hidden_modules(folders, part):
            where = " or ".join(str(folder) for folder in folders)
            raise ModuleNotFoundError(f"no module {part} in {where}")
        if not packages:
            return None
        folders = packages
    return None


def _has_hidden_modules(folders: list[Path], part: str) -> bool:
    """Whether a package may have a module that is no .py file of that name in its folders."""
    if any(any(folder.glob(f"{part}.*")) for folder in folders):
        return True  # compiled
    inits = [folder / "__init__.py" for folder in folders]
    texts = [init.read_bytes() for init in inits if init.is_file()]
    return any(word in text for text in texts for word in (b"__path__", b"sys.modules"))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that a module runs itself, also within if, try, with and loops."""
    for statement in body:
        yield statement
        if not isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for child in ast.iter_child_nodes(statement):
                if isinstance(child, ast.stmt):
                    yield from _statements([child])
                elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                    yield from _statements(child.body)


def _names_bound(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return {statement.name}
        case ast.Import() | ast.ImportFrom():
            return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    own = [child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt)]
    return {
        node.id
        for child in own
        for node in ast.walk(child)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }


def _may_have_more(tree: ast.Module, statements: list[ast.stmt]) -> bool:
    """Whether a module may have names that its statements do not bind."""
    for statement in statements:
        if "__getattr__" in _names_bound(statement):  # also of a lazy loader's, as SPEC 1 has it
            return True
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            return True
        if isinstance(statement, ast.ClassDef):
            continue  # a model may well call setattr on itself
        if any(isinstance(n, ast.Name) and n.id in DYNAMIC for n in ast.walk(statement)):
            return True
        if any(isinstance(n, ast.Attribute) and n.attr == "modules" for n in ast.walk(statement)):
            return True  # sys.modules[__name__]
    return any(isinstance(node, (ast.Global, ast.NamedExpr)) for node in ast.walk(tree))


def _assigns(source: Source, attribute: str) -> bool:
    """Whether a module sets an attribute of something: self.forward = ..."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.ctx, ast.Store)
        for node in ast.walk(source.tree)
    )


class _AsWritten(str):
    """A piece of source that a signature shows as it is."""

    __slots__ = ()
    __repr__ = str.__str__


def _parameter(argument: ast.arg, kind: Any, default: ast.expr | None = None) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        argument.arg,
        kind,
        default=_AsWritten(ast.unparse(default)) if default else empty,
        annotation=_AsWritten(ast.unparse(argument.annotation)) if argument.annotation else empty,
    )
