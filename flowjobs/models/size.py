"""How many parameters the built-in models have, and the width for a number of them. Loads no torch.

The sums below are those of the modules in mlp.py, unet.py and dit.py; a test holds them together.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from flowjobs.config import BUILT_IN_ARCHS, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.formatting import format_count, parse_count

# How far from --params a model may be, so that models are compared at equal size.
TOLERANCE = 0.05
WIDEST = 2**20
# Weights, their EMA and two moments of AdamW, float32; in best.pt, last.pt and the ones before.
CHECKPOINT_BYTES = 4 * 4 * 4  # a parameter

Count = Callable[[int], int]


def with_fixed_width(config: TrainingConfig, shape: tuple[int, ...] | None) -> TrainingConfig:
    """The config with the width that `--params` chooses, as far as that is known without torch.

    It is not where the model is the user's own, or the data's width is in a file of another kind
    than torch.save and numpy.save write today: where such a run starts, `build_model` chooses.

    Args:
        config: What is asked for.
        shape: Shape of a row of the data; None if that is not known.

    Raises:
        ConfigError: No width comes close enough, or the one that is given does not.
    """
    known = config.arch_path in BUILT_IN_ARCHS and shape is not None and len(shape) == 1
    if config.params is None or not known:
        return config
    assert shape is not None
    width = width_of(config, *shape)
    return config if "width" in config.arch_args else replace(config, width=width)


def width_of(config: TrainingConfig, dim: int) -> int:
    """The width of a built-in model that has the parameters of `--params`.

    Raises:
        ConfigError: See `with_fixed_width`.
    """
    arguments = dict(config.model_args)
    given = arguments.pop("width", None)
    what = f"{config.arch} on {dim} dimensions"

    def count(width: int) -> int:
        return parameters_of(config.arch_path, dim, width, arguments)

    if given is not None:
        check_count(config, count(given), f"--width {given}", what)
        return int(given)
    step = arguments.get("heads", 4) if config.arch_path == "dit" else 1
    return search_width(config, count, step, what)


def parameters_of(arch: str, dim: int, width: int, arguments: Mapping[str, Any]) -> int:
    """The parameters of a built-in model.

    Args:
        arch: Its name.
        dim: Width of the data.
        width: The model's.
        arguments: Its other ones, as its constructor takes them.
    """
    counts: dict[str, Callable[..., int]] = {"mlp": _mlp, "unet": _unet, "dit": _dit}
    counted = {key: value for key, value in arguments.items() if key != "dropout"}
    return counts[arch](dim, width, **counted)


def checkpoint_bytes_of(config: TrainingConfig, shape: tuple[int, ...] | None) -> int | None:
    """About what the checkpoints of a run will take; None where its width is not given, or it is no
    built-in model on data of a known width."""
    arguments = dict(config.model_args)
    width = arguments.pop("width", None)
    if width is None or config.arch_path not in BUILT_IN_ARCHS or len(shape or ()) != 1:
        return None
    assert shape is not None
    return CHECKPOINT_BYTES * parameters_of(config.arch_path, shape[0], width, arguments)


def search_width(config: TrainingConfig, count: Count, step: int, what: str) -> int:
    """The width whose parameters are nearest to those that `--params` asks for.

    Args:
        config: Has `params`.
        count: The parameters by width; more for a larger one.
        step: The width is a multiple of this.
        what: Is counted, for the error's text.

    Raises:
        ConfigError: The nearest is too far from them.
    """
    target = asked_parameters(config)
    above = 1
    while count(above * step) < target and above * step < WIDEST:
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        if count(middle * step) < target:
            below = middle
        else:
            above = middle
    nearest = [number * step for number in (below, above) if number]
    best = min(nearest, key=lambda width: abs(count(width) - target))
    if not is_close(count(best), target):
        there = " and ".join(f"{format_count(count(w))} (--width {w})" for w in nearest)
        raise ConfigError(
            f"--params: found {config.params}, which {what} cannot have within "
            f"{TOLERANCE:.0%}: the nearest are {there}; give one of these widths, or another "
            "--depth"
        )
    return best


def check_count(config: TrainingConfig, found: int, given: str, what: str) -> None:
    """Raise a ConfigError unless a model has about as many parameters as `--params` asks for."""
    if not is_close(found, asked_parameters(config)):
        raise ConfigError(
            f"{given}: {what} has {format_count(found)} parameters with it, and --params asks for "
            f"{config.params}: give one of the two"
        )


def is_close(found: int, target: int) -> bool:
    """Whether two numbers of parameters are equal within the tolerance."""
    return abs(found - target) <= TOLERANCE * target


def size_words(configs: Iterable[TrainingConfig]) -> str:
    """The widths that `--params` has chosen: "mlp 500k: width 229, dit 500k: width 100"."""
    chosen = (
        f"{config.arch_label} {config.params}: "
        + (f"width {width}" if (width := config.model_args.get("width")) else "found at its start")
        for config in configs
        if config.params is not None
    )
    return ", ".join(dict.fromkeys(chosen))


def asked_parameters(config: TrainingConfig) -> int:
    """`--params` as a number."""
    found = parse_count(config.params or "")
    assert found is not None, "the config has checked it"
    return found


def _linear(n_in: int, n_out: int) -> int:
    return (n_in + 1) * n_out


def _block(width: int, time_width: int) -> int:
    return _linear(time_width, 3 * width) + 2 * _linear(width, width)


def _ends(dim: int, width: int, time_width: int) -> int:
    into_and_out_of = _linear(dim, width) + _linear(width, dim)
    return into_and_out_of + 2 * _linear(time_width, time_width) + _linear(time_width, 2 * width)


def _mlp(dim: int, width: int, depth: int = 3, time_width: int = 64) -> int:
    return _ends(dim, width, time_width) + depth * _block(width, time_width)


def _unet(dim: int, width: int, depth: int = 2, time_width: int = 64) -> int:
    found = _ends(dim, width, time_width)
    for level in range(depth):
        wider, narrower = (max(1, width >> at) for at in (level, level + 1))
        found += 2 * _block(wider, time_width)
        found += _linear(wider, narrower) + _linear(narrower + wider, wider)
    return found + _block(max(1, width >> depth), time_width)


def _dit(
    dim: int,
    width: int,
    depth: int = 3,
    chunk: int | None = None,
    heads: int = 4,
    time_width: int = 64,
) -> int:
    del heads  # they share the width
    chunk = math.isqrt(dim) if chunk is None else chunk
    tokens = -(-dim // chunk)
    by_token = (tokens - 1) * (_linear(chunk, width) + _linear(width, chunk))
    attention = _linear(width, 3 * width) + _linear(width, width)
    feed_forward = _linear(width, 4 * width) + _linear(4 * width, width)
    block = _linear(time_width, 6 * width) + attention + feed_forward
    return _ends(chunk, width, time_width) + by_token + depth * block
