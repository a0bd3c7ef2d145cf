"""The parameters of a model, counted without torch, and the width that --params chooses."""

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowjobs.config import BUILT_IN_ARCHS, TrainingConfig, signature_differences
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues
from flowjobs.formatting import format_count, parse_count
from flowjobs.models.build import build_model
from flowjobs.models.size import parameters_of, with_fixed_width
from flowjobs.models.source import check_model
from flowjobs.runs.selection import fields_of
from tests.report.made_up import made_run


def count(model: nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())


def on_meta(config: TrainingConfig, dim: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(config, dim)


ARGUMENTS: list[tuple[str, Mapping[str, Any]]] = [
    *((arch, {}) for arch in BUILT_IN_ARCHS),
    ("mlp", {"depth": 5, "time_width": 32, "dropout": 0.1}),
    ("unet", {"depth": 4, "time_width": 32}),
    ("dit", {"depth": 1, "chunk": 5, "heads": 2, "time_width": 32}),
]


@pytest.mark.parametrize(("arch", "arguments"), ARGUMENTS)
@pytest.mark.parametrize("dim", [2, 7, 64, 1024])
def test_the_sum_is_the_model(arch: str, arguments: Mapping[str, Any], dim: int) -> None:
    for width in (8, 24, 520):
        config = TrainingConfig(arch=arch, width=width, arch_args=KeyValues(arguments))
        assert parameters_of(arch, dim, width, arguments) == count(on_meta(config, dim))


def test_heads_without_a_width_get_one_that_they_divide() -> None:
    for heads in (3, 4, 7, 256):
        config = TrainingConfig(arch="dit", arch_args=KeyValues(heads=heads))
        check_model(config)
        x = torch.randn(2, 9)
        assert build_model(config, 9)(x, torch.rand(2)).shape == x.shape


@pytest.mark.parametrize("arch", BUILT_IN_ARCHS)
@pytest.mark.parametrize("dim", [64, 256, 1024])
def test_models_of_so_many_parameters_are_of_one_size(arch: str, dim: int) -> None:
    for params in ("500k", "2M", "10_000_000"):
        asked = TrainingConfig(arch=arch, params=params)
        fixed = with_fixed_width(asked, (dim,))
        found = count(on_meta(fixed, dim))
        assert abs(found / (parse_count(params) or 0) - 1) < 0.05
        assert with_fixed_width(fixed, (dim,)) == fixed
        assert count(on_meta(asked, dim)) == found  # where submit did not know the data's width


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"params": "9"}, r"mlp on 64 .* within 5%: the nearest are .*\(--width 1\).*--depth"),
        ({"arch": "dit", "params": "17k"}, r"the nearest are \S+k \(--width 4\) and \S+k \(--wid"),
        ({"params": "2M", "width": 8}, r"--width 8: mlp .* 15.6k parameters with it, .* give one"),
        ({"params": "2M", "arch_args": KeyValues(width=8)}, r"--width 8: mlp .* give one of the"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest(options: dict[str, Any], said: str) -> None:
    config = TrainingConfig(**options)
    with pytest.raises(ConfigError, match=said):
        with_fixed_width(config, (64,))
    with pytest.raises(ConfigError, match=said):
        build_model(config, 64)


class Own(nn.Module):
    """Takes data of any shape, and looks at a number as it is built, unless it is deep."""

    def __init__(self, shape: int | tuple[int, ...], width: int, depth: int = 2) -> None:
        super().__init__()
        self.scale = torch.ones(1).item() if depth < 3 else 1.0
        channels = shape if isinstance(shape, int) else shape[0]
        sizes = [channels, *[width] * depth, channels]
        self.layers = nn.Sequential(*(nn.Conv1d(*pair, 3) for pair in itertools.pairwise(sizes)))


def test_the_width_of_ones_own_model_is_found_by_building_it() -> None:
    config = TrainingConfig(arch=f"{__name__}:Own", params="50k", depth=3)
    check_model(config)
    for shape, depth in ((6, 3), ((3, 8), 2)):
        model = build_model(replace(config, depth=depth), shape)
        assert abs(count(model) / 50_000 - 1) < 0.05
        assert len(model.layers) == depth + 1
    assert with_fixed_width(config, (6,)) == config
    with pytest.raises(ConfigError, match=r"--width 4: Own .* give one of the two"):
        build_model(replace(config, width=4), 6)
    with pytest.raises(ConfigError, match=r"--params: there is no argument width .*Linear takes"):
        build_model(TrainingConfig(arch="torch.nn:Linear", params="2M"), 6)


@functools.cache
def table(dim: int) -> Tensor:
    return torch.linspace(0, 1, dim)


class Cached(Own):
    """Has a buffer from a cache."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(dim, width, depth=3)
        self.register_buffer("table", table(dim))


def test_a_buffer_that_is_kept_of_a_model_without_numbers_is_said_with_the_width() -> None:
    config = TrainingConfig(arch=f"{__name__}:Cached", params="50k")
    with pytest.raises(ConfigError, match=r"Cached takes table from .* --width \d+$") as said:
        build_model(config, 6)
    table.cache_clear()  # as in the process of the next start
    width = int(str(said.value).split()[-1])
    model = build_model(replace(config, params=None, width=width), 6)
    assert abs(count(model) / 50_000 - 1) < 0.05


def test_a_size_that_is_given_twice_is_refused() -> None:
    for name in ("width", "depth"):
        with pytest.raises(ConfigError, match=f"--{name}: found 4, and {name}=8 in --arch-args"):
            TrainingConfig(arch_args=KeyValues({name: 8}), **{name: 4})
    with pytest.raises(ConfigError, match="--depth: found 0, expected at least 1"):
        TrainingConfig(depth=0)
    with pytest.raises(ConfigError, match="--params: found '2g', expected a number of parameters"):
        TrainingConfig(params="2g")


def test_a_size_is_one_thing_by_whichever_option(study: Path) -> None:
    field, argument = TrainingConfig(width=512), TrainingConfig(arch_args=KeyValues(width=512))
    assert field.signature == argument.signature != TrainingConfig().signature
    chosen = replace(field, params="2M")
    assert chosen.signature == field.signature
    assert TrainingConfig(params="2M").signature != TrainingConfig().signature
    other = replace(argument, arch_args=KeyValues(width=256, dropout=0.1)).to_dict()
    assert signature_differences(other, chosen.to_dict()) == [
        "  --width: 256 there, 512 asked for",
        "  --arch-args dropout: 0.1 there, the default asked for",
    ]
    for name, config in (("field", {"width": 512}), ("arg", {"arch_args": KeyValues(width=512)})):
        run = made_run(study, [1.0], name=name, **config)
        assert fields_of(run)["width"] == 512


@pytest.mark.parametrize(
    ("text", "number", "words"),
    [
        ("500k", 500_000, "500k"),
        ("1_994_752", 1_994_752, "1.99M"),
        ("1.5m", 1_500_000, "1.5M"),
        ("1.1k", 1_100, "1.1k"),
        ("0", 0, "0"),
    ],
)
def test_counts(text: str, number: int, words: str) -> None:
    assert (parse_count(text), format_count(number)) == (number, words)
    assert parse_count(re.sub(r"\d", "x", text)) is None
