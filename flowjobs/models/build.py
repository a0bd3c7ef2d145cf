"""Models that predict a velocity: (x: (batch, dim), t: (batch,)) -> (batch, dim)."""

import importlib
import inspect

import torch
from torch import nn

from flowjobs.config import TrainingConfig, check_arch
from flowjobs.data.randomness import seed_python_and_numpy
from flowjobs.errors import ConfigError
from flowjobs.models.mlp import MLP
from flowjobs.models.source import check_arguments


def build_model(config: TrainingConfig, dim: int) -> nn.Module:
    """The model of `--arch` for data of width `dim`, with its weights drawn from the seed.

    Raises:
        ConfigError: There is no such model, or it does not take these arguments.
    """
    check_arch(config)
    cls = _model_class(config.arch_path)
    check_arguments(inspect.signature(cls), cls.__name__, config.arch_args)
    torch.manual_seed(config.seed)
    # What a model draws and does not keep in its state must come out the same at each start.
    seed_python_and_numpy(config.seed)
    try:
        return cls(dim, **config.arch_args)
    except (TypeError, ValueError, RuntimeError) as error:
        if cls is not MLP:
            raise  # a bug in the user's own model wants its traceback
        raise ConfigError(f"--arch-args {dict(config.arch_args)}: {error}") from error


def _model_class(arch: str) -> type[nn.Module]:
    match arch:
        case "mlp":
            return MLP
    module, _, name = arch.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the user's module exists; what it imports does not
        raise ConfigError(f"--arch {arch}: no module {error.name} on PYTHONPATH") from error
    except AttributeError as error:
        raise ConfigError(f"--arch {arch}: the module {module} has no {name}") from error
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise ConfigError(f"--arch {arch}: {name} is not a subclass of torch.nn.Module")
    return cls
