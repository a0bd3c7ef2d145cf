"""What the source of a model says of its constructor, read without running it.

`submit` runs nothing of the user's and loads no torch. Where the source does not say for certain
what there will be (a class made by a function, a decorator, a base class from elsewhere), nothing
is refused here; where the run starts, the class itself is asked.
"""

import ast
import difflib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowjobs.config import BUILT_IN_ARCHS, SIZE_FIELDS, TrainingConfig, flag
from flowjobs.errors import ConfigError
from flowjobs.nearest import did_you_mean
from flowjobs.user_code import check_module, is_import_path

BUILT_IN_SOURCES = {
    "mlp": "flowjobs.models.mlp:MLP",
    "unet": "flowjobs.models.unet:UNet",
    "dit": "flowjobs.models.dit:DiT",
}
# From one module to the next that it imports the class from.
FOLLOW_AT_MOST = 5
# With these a module may make names that its source does not show.
DYNAMIC = {"globals", "locals", "vars", "exec", "eval", "setattr"}


def check_arch(config: TrainingConfig, labels: Iterable[str] = ()) -> None:
    """Raise a ConfigError unless --arch is built in or can be found. Imports no user code.

    The class itself is looked up where the run starts, since its module loads torch.

    Args:
        config: What is asked for.
        labels: The user's own names for models, which may have been meant.
    """
    if config.arch_path in BUILT_IN_ARCHS:
        return
    if not is_import_path(config.arch_path):
        raise ConfigError(
            f"--arch: found {config.arch!r}, expected one of {', '.join(BUILT_IN_ARCHS)}, or your "
            f"own nn.Module as package.module:Name"
            f"{did_you_mean(config.arch, {*BUILT_IN_ARCHS, *labels})}"
        )
    check_module("--arch", config.arch)


def check_model(config: TrainingConfig) -> None:
    """Raise a ConfigError where the source of `--arch` shows that it cannot be built.

    The class is not in its module, or does not take these arguments, or the module is no Python.
    """
    module, _, name = BUILT_IN_SOURCES.get(config.arch_path, config.arch_path).partition(":")
    try:
        file = _file_of(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--arch {config.arch}: {error}") from error
    if file is None:
        return
    source = _Source.read(file, module)
    if isinstance(source, SyntaxError):
        raise ConfigError(f"--arch {config.arch}: {file}:{source.lineno}: {source.msg}")
    found = _definition(source, name) if source else None
    if isinstance(found, _Missing):
        near = difflib.get_close_matches(name, found.classes, n=1)
        there = (
            f"did you mean {near[0]}?"
            if near
            else f"its classes: {', '.join(found.classes) or 'none'}"
        )
        raise ConfigError(f"--arch {config.arch}: {file} has no {name}; {there}")
    signature = _constructor(found) if found else None
    if signature is None:
        return
    check_arguments(signature, name, config)
    if config.arch_path in BUILT_IN_ARCHS:
        _check_types(signature, config.model_args)


def may_take(arch: str, argument: str) -> bool:
    """Whether a model takes an argument of this name; yes where its source does not say."""
    path = arch.rpartition("=")[2]
    module, _, name = BUILT_IN_SOURCES.get(path, path).partition(":")
    try:
        file = _file_of(module) if name else None
    except ModuleNotFoundError:
        return True  # which is said elsewhere
    source = _Source.read(file, module) if file else None
    found = _definition(source, name) if isinstance(source, _Source) else None
    signature = _constructor(found) if isinstance(found, _Found) else None
    if signature is None:
        return True
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return argument in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds


def check_vectors(config: TrainingConfig, shape: tuple[int, ...] | None) -> None:
    """Raise a ConfigError where a built-in model is given other data than vectors.

    Args:
        config: Names the model.
        shape: Of a row of the data; None if that is not known.
    """
    if config.arch_path in BUILT_IN_ARCHS and shape is not None and len(shape) > 1:
        raise ConfigError(
            f"--arch {config.arch} is for vectors, and the rows of {config.dataset} are of shape "
            f"{shape}: flatten them, or give a model of your own"
        )


def check_arguments(signature: inspect.Signature, name: str, config: TrainingConfig) -> None:
    """Raise a ConfigError unless a constructor takes the data's width and the model's arguments.

    Args:
        signature: Of the class `name`, without `self`.
        name: For the error's text.
        config: Has the arguments.
    """
    arguments = config.model_args
    accepted = list(signature.parameters.values())[1:]
    takes = f"{name} takes the data's width and ({', '.join(str(p) for p in accepted)})"
    names = {"width", *(p.name for p in accepted if p.kind is p.VAR_KEYWORD)}
    if config.params is not None and not names & {p.name for p in accepted}:
        raise ConfigError(f"--params: there is no argument width that it could choose; {takes}")
    if config.params is not None:
        arguments.setdefault("width", 1)  # any: it is chosen later
    positional = [p for p in signature.parameters.values() if p.kind in _POSITIONAL]
    if not positional:
        raise ConfigError(
            f"--arch {name}: its constructor takes no argument that the data's width could be "
            f"given to, expected one as the first: def __init__(self, dim, ...)"
        )
    try:
        signature.bind(0, **arguments)
    except TypeError as error:
        unknown = [key for key in arguments if key not in signature.parameters]
        fields = [
            flag(key) for key in unknown if key in SIZE_FIELDS and key not in config.arch_args
        ]
        near = [
            f"did you mean {match[0]}? "
            for key in unknown
            if (match := difflib.get_close_matches(key, [p.name for p in accepted], n=1))
        ]
        raise ConfigError(
            f"{(fields or ['--arch-args'])[0]}: {error}; {''.join(near)}{takes}"
        ) from error


_POSITIONAL = {
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
}


def _check_types(signature: inspect.Signature, arguments: Mapping[str, Any]) -> None:
    """Of a built-in model, whose annotations hold, and whose numbers count something."""
    accepted = {"int": (int,), "int | None": (int,), "float": (int, float)}
    for key, value in arguments.items():
        expected = str(signature.parameters[key].annotation)
        if expected in accepted and type(value) not in accepted[expected]:
            raise ConfigError(f"--arch-args {key}: found {value!r}, expected {expected}")
        if expected.startswith("int") and value < 1:
            raise ConfigError(f"--arch-args {key}: found {value}, expected at least 1")
    if not 0 <= (dropout := arguments.get("dropout", 0)) < 1:
        raise ConfigError(f"--arch-args dropout: found {dropout}, expected at least 0, less than 1")
    if (time_width := arguments.get("time_width", 2)) % 2:
        raise ConfigError(f"--arch-args time_width: found {time_width}, expected an even number")
    heads = arguments.get("heads", 4)
    if "heads" in signature.parameters and arguments.get("width", heads) % heads:
        raise ConfigError(
            f"--width: found {arguments['width']}, expected a multiple of heads ({heads})"
        )


@dataclass(frozen=True)
class _Source:
    """A module's text, parsed."""

    module: str
    is_package: bool
    tree: ast.Module

    @classmethod
    def read(cls, file: Path, module: str) -> "_Source | SyntaxError | None":
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError as error:
            return error
        except (OSError, ValueError, RecursionError):
            return None
        return cls(module, file.name == "__init__.py", tree)


@dataclass(frozen=True)
class _Found:
    """A class in the module that defines it."""

    source: _Source
    node: ast.ClassDef


@dataclass(frozen=True)
class _Missing:
    """The module has no such name for certain; these classes it has."""

    classes: list[str]


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


def _definition(source: _Source, name: str, followed: int = 0) -> _Found | _Missing | None:
    """Where a class is defined; None where the source does not say."""
    statements = list(_statements(source.tree.body))
    bindings: list[ast.AST] = []
    for statement in statements:
        if name in _names_bound(statement):
            bindings.append(statement)
    if len(bindings) == 1 and isinstance(node := bindings[0], ast.ClassDef):
        return _Found(source, node)
    if len(bindings) == 1 and isinstance(node := bindings[0], ast.ImportFrom):
        return _imported(source, node, name, followed)
    if bindings or _may_have_more(source.tree, statements):
        return None
    return _Missing([node.name for node in statements if isinstance(node, ast.ClassDef)])


def _imported(
    source: _Source, node: ast.ImportFrom, name: str, followed: int
) -> _Found | _Missing | None:
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    parts = source.module.split(".")
    base = parts[: len(parts) - node.level + source.is_package] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    try:
        file = _file_of(module) if module and followed < FOLLOW_AT_MOST else None
    except ModuleNotFoundError:
        file = None  # the import may be one that is tried
    there = _Source.read(file, module) if file else None
    if not isinstance(there, _Source):
        return None
    found = _definition(there, original, followed + 1)
    # What is missing there may be a module of that package.
    return found if isinstance(found, _Found) else None


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
        if isinstance(statement, ast.FunctionDef) and statement.name == "__getattr__":
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


def _constructor(found: _Found | None) -> inspect.Signature | None:
    """The signature of a class's constructor, without `self`; None where it is not certain."""
    for _ in range(FOLLOW_AT_MOST):
        if not isinstance(found, _Found):
            return None
        node = found.node
        if node.decorator_list or node.keywords:
            return None
        bound = [s for s in _statements(node.body) if _names_bound(s) & {"__init__", "__new__"}]
        match bound:
            case [ast.FunctionDef("__init__") as init] if init in node.body:
                return None if init.decorator_list else _signature(init.args)
        if bound or len(node.bases) != 1 or not isinstance(base := node.bases[0], ast.Name):
            return None
        there = _definition(found.source, base.id)
        found = there if isinstance(there, _Found) else None
    return None


class _AsWritten(str):
    """A piece of source that a signature shows as it is."""

    __slots__ = ()
    __repr__ = str.__str__


def _signature(arguments: ast.arguments) -> inspect.Signature:
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
    return inspect.Signature(parameters[1:] if positional else parameters)


def _parameter(argument: ast.arg, kind: Any, default: ast.expr | None = None) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        argument.arg,
        kind,
        default=_AsWritten(ast.unparse(default)) if default else empty,
        annotation=_AsWritten(ast.unparse(argument.annotation)) if argument.annotation else empty,
    )
