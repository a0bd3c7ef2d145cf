"""Models that predict a velocity: (x: (batch, *shape), t: (batch,)) -> (batch, *shape)."""

import functools
import inspect
from typing import Any

import torch
from torch import nn

from flowjobs.config import BUILT_IN_ARCHS, TrainingConfig
from flowjobs.data.randomness import seed_python_and_numpy
from flowjobs.errors import ConfigError
from flowjobs.models.flops import parameters_in
from flowjobs.models.size import check_count, search_width, width_of
from flowjobs.models.source import BUILT_IN_SOURCES, check_arch, check_arguments, check_vectors
from flowjobs.user_code import imported

# In the names of a state of what torch.compile returns, as a notebook may have trained it.
COMPILED = "_orig_mod."


def build_model(config: TrainingConfig, shape: int | tuple[int, ...]) -> nn.Module:
    """The model of `--arch`, with its weights drawn from the seed.

    Args:
        config: Names the model, its arguments and the seed.
        shape: Shape of a row of the data, or the width of a vector. A model of the user's own gets
            the width of vectors, and the shape of other data.

    Raises:
        ConfigError: There is no such model, or it takes other arguments, or no such data.
    """
    check_arch(config)
    shape = (shape,) if isinstance(shape, int) else shape
    check_vectors(config, shape)
    # What its module draws as it is imported is in no state, and must be the same in each process.
    # By a constant, since the runs that one process builds share the module.
    _seed(0)
    cls = _model_class(config.arch_path)
    check_arguments(inspect.signature(cls), cls.__name__, config)
    given = shape[0] if len(shape) == 1 else shape
    arguments = dict(config.model_args)
    if config.params is not None:
        arguments["width"] = _chosen_width(config, cls, given)
    # What a model draws and does not keep in its state must be the same at each start.
    _seed(config.seed)
    try:
        model = cls(given, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        if config.arch_path not in BUILT_IN_ARCHS:
            raise  # a bug in the user's own model wants its traceback
        raise ConfigError(f"--arch-args {arguments}: {error}") from error
    if config.params is not None and config.arch_path not in BUILT_IN_ARCHS:
        _check_has_values(model, config, arguments["width"])
    return model


def _seed(value: int) -> None:
    torch.manual_seed(value)
    seed_python_and_numpy(value)


def _chosen_width(config: TrainingConfig, cls: type[nn.Module], shape: Any) -> int:
    """The width that `--params` means; of a model of the user's own it is found by building it."""
    if config.arch_path in BUILT_IN_ARCHS:
        return width_of(config, shape)
    arguments = dict(config.model_args)
    given = arguments.pop("width", None)

    @functools.cache
    def count(width: int) -> int:
        try:
            with torch.device("meta"):  # without numbers, so that trying wide ones costs nothing
                model = cls(shape, width=width, **arguments)
        except Exception:  # it looks at its numbers as it is built
            model = cls(shape, width=width, **arguments)
        return parameters_in(model)

    what = f"{config.arch_label} on data of shape {shape}"
    if given is not None:
        check_count(config, count(given), f"--width {given}", what)
        return int(given)
    return search_width(config, count, 1, what)


def _check_has_values(model: nn.Module, config: TrainingConfig, width: int) -> None:
    """Raise a ConfigError where a model holds a tensor of one that was built to be counted."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                f"--params: --arch {config.arch_label} takes {name} from a cache (functools.cache, "
                "say) that was filled while models were built without values (device meta) to "
                f"count their parameters: give the width that was found instead, --width {width}"
            )


def is_built_in(model: nn.Module) -> bool:
    """Whether a model is one of flowjobs' own, which draw random numbers from torch alone."""
    return type(model).__module__ in {of.partition(":")[0] for of in BUILT_IN_SOURCES.values()}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, also of what torch.compile returns."""
    return dict(model.named_children()).get(COMPILED.removesuffix("."), model)


def class_unnamed(model: nn.Module, config: TrainingConfig) -> str:
    """The class of a model, `module:Name`, where that is not the one of `--arch`; else ""."""
    model = uncompiled(model)
    path = f"{type(model).__module__}:{type(model).__qualname__}"
    return "" if path == BUILT_IN_SOURCES.get(config.arch_path, config.arch_path) else path


def _model_class(arch: str) -> type[nn.Module]:
    cls = imported("--arch", BUILT_IN_SOURCES.get(arch, arch))
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise ConfigError(
            f"--arch {arch}: {arch.rpartition(':')[2]} is not a subclass of torch.nn.Module"
        )
    return cls
