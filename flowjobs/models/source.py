"""What the source of a model says of how it is built and called, read without running it.

`submit` runs nothing of the user's and loads no torch. Where the source does not say for certain
what there will be (a class made by a function, a decorator, a base class from elsewhere), nothing
is refused here; where the run starts, the class itself is asked.
"""

import ast
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from flowjobs.config import BUILT_IN_ARCHS, SIZE_FIELDS, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.field_values import flag
from flowjobs.nearest import did_you_mean
from flowjobs.user_code import check_call, check_module, is_import_path
from flowjobs.user_source import Found, as_class, binding_in, method_of

BUILT_IN_SOURCES = {
    "mlp": "flowjobs.models.mlp:MLP",
    "unet": "flowjobs.models.unet:UNet",
    "dit": "flowjobs.models.dit:DiT",
}
# What a model is called with: points, and their times.
FORWARD = ("x", "t")


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
    """Raise a ConfigError where the source of `--arch` shows that it cannot be built or called.

    The class is not in its module, or does not take these arguments, or its forward not (x, t), or
    the module is no Python.
    """
    path = BUILT_IN_SOURCES.get(config.arch_path, config.arch_path)
    bound = binding_in(f"--arch {config.arch}", path, ast.ClassDef)
    _check_is_module(bound, config.arch)
    found = as_class(bound)
    if found is None:
        return
    if forward := _forward(found):
        check_call(forward, f"--arch {config.arch}: its forward", FORWARD)
    if signature := _constructor(found):
        check_arguments(signature, path.partition(":")[2], config)
        if config.arch_path in BUILT_IN_ARCHS:
            _check_types(signature, config.model_args)


def _check_is_module(bound: Found[ast.stmt] | None, arch: str) -> None:
    """Raise a ConfigError for a function, or a class of its own, which surely is no nn.Module."""
    name, expected = arch.rpartition(":")[2], "a subclass of torch.nn.Module"
    match bound and bound.node:
        case ast.FunctionDef(decorator_list=[]):
            raise ConfigError(f"--arch {arch}: {name} is a function, expected {expected}")
        case ast.ClassDef(decorator_list=[], bases=[], keywords=[]):
            raise ConfigError(f"--arch {arch}: {name} is not {expected}")


def may_take(arch: str, argument: str) -> bool:
    """Whether a model takes an argument of this name; yes where its source does not say."""
    path = arch.rpartition("=")[2]
    path = BUILT_IN_SOURCES.get(path, path)
    try:
        found = as_class(binding_in("--arch", path, ast.ClassDef)) if ":" in path else None
    except ConfigError:
        return True  # which is said elsewhere
    signature = _constructor(found) if found else None
    if signature is None:
        return True
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return argument in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds


def check_vectors(config: TrainingConfig, shape: tuple[int, ...] | None) -> None:
    """Raise a ConfigError where a built-in model is given other data than vectors.

    Args:
        config: Names the model.
        shape: Shape of a row of the data; None if that is not known.
    """
    if config.arch_path in BUILT_IN_ARCHS and shape is not None and len(shape) > 1:
        raise ConfigError(
            f"--arch {config.arch} is for vectors, and the rows of {config.dataset} are of shape "
            f"{shape}: flatten them, or give a model of your own"
        )


def check_arguments(signature: inspect.Signature, name: str, config: TrainingConfig) -> None:
    """Raise a ConfigError unless a constructor takes the data's width and the model's arguments.

    Args:
        signature: That of the class `name`, without `self`.
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
    """Check arguments of a built-in model, whose annotations hold and whose numbers are counts."""
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


def _constructor(found: Found[ast.ClassDef]) -> inspect.Signature | None:
    """The signature of a class's constructor, without `self`; None where it is not certain."""
    return method_of(found, "__init__", other="__new__")


def _forward(found: Found[ast.ClassDef]) -> inspect.Signature | None:
    """The same of how a model is called."""
    return method_of(found, "forward", other="__call__")
