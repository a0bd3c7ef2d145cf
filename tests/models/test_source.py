"""What a model's source says: a mistake is named, and what is not certain is not refused."""

import sys
from pathlib import Path

import pytest

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues
from flowjobs.flows.flow import check_flow
from flowjobs.models.imports import missing_imports
from flowjobs.models.source import check_arch, check_model

NETS = """
import functools
from torch import nn
from .blocks import Block, Base as Foundation

class WideNet(nn.Module):
    def __init__(self, dim: int, width: int = 64, *, depth=3): ...

class NeedsRank(nn.Module):
    def __init__(self, dim, rank): ...

class NoDim(nn.Module):
    def __init__(self): ...

class Inherits(WideNet): ...

class FromElsewhere(Foundation): ...

class Open(nn.Module):
    def __init__(self, *args, **kwargs): ...

class NoTime(nn.Module):
    def __init__(self, dim): ...
    def forward(self, x): ...

class Timeless(NoTime): ...

class TimeFirst(NoTime):
    def forward(self, t: Tensor, x_t, y=None): ...

class Tokens(NoTime):
    def forward(self, t, times): ...

class Assigned(NoTime):
    def __call__(self, *args): ...

@functools.cache
class Decorated(nn.Module):
    def __init__(self): ...

class New(nn.Module):
    def __new__(cls, *args): ...
    def __init__(self): ...

class Unknown(nn.Sequential): ...

try:
    class Either(nn.Module):
        def __init__(self, dim): ...
except ImportError:
    Either = None

Alias = functools.partial(WideNet, width=3)

def make(dim): return WideNet(dim)

@functools.cache
def made(dim): ...

class Config:
    width = 64
"""


@pytest.fixture(autouse=True)
def package(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(workplace), *sys.path])
    folder = workplace / "my_models"
    (folder / "deep").mkdir(parents=True)
    # Nothing is run: each of these would raise.
    (folder / "__init__.py").write_text("from .nets import WideNet\nraise SystemExit('run')\n")
    (folder / "nets.py").write_text(NETS + "raise SystemExit('run')\n")
    (folder / "blocks.py").write_text(
        "class Block:\n    pass\nclass Base:\n    def __init__(self, dim, groups=1): ...\n"
    )
    (folder / "broken.py").write_text("class Net(:\n")
    (folder / "many.py").write_text("\n".join(f"class X{n}: ..." for n in range(70)))
    (folder / "lazy.py").write_text("def __getattr__(name): ...\n")
    (folder / "attached.py").write_text(
        "import lazy_loader as lazy\n"
        "__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={'nets': ['Net']})\n"
    )
    (folder / "borrowed.py").write_text("from ._lazy import __getattr__\n")
    (folder / "star.py").write_text("from .blocks import *\n")
    (folder / "made.py").write_text("for n in 'AB':\n    globals()[n] = type(n, (), {})\n")
    (folder / "deep" / "__init__.py").write_text("from ..nets import WideNet as Deep\n")
    return folder


def check(arch: str, **arguments: object) -> None:
    check_model(TrainingConfig(arch=arch, arch_args=KeyValues(arguments)))


@pytest.mark.parametrize(
    ("arch", "arguments", "said"),
    [
        ("mlp", {"widht": 64}, "'widht'; did you mean width. MLP takes .*width: int .* None, dep"),
        ("mlp", {"width": "big"}, "--arch-args width: found 'big', expected int"),
        ("unet", {"width": -3}, "--arch-args width: found -3, expected at least 1"),
        ("mlp", {"dropout": 1}, "--arch-args dropout: found 1, expected at least 0, less than 1"),
        ("dit", {"dropout": -0.5}, "--arch-args dropout: found -0.5"),
        ("mlp", {"time_width": 7}, "--arch-args time_width: found 7, expected an even number"),
        ("dit", {"heads": 3, "width": 64}, r"--width: found 64, expected a multiple of heads \(3"),
        ("mlp", {"dim": 3}, "multiple values for argument 'dim'"),
        ("my_models.nets:WidNet", {}, "nets.py has no WidNet; did you mean WideNet?"),
        ("my_models.blocks:Net", {}, "blocks.py has no Net; its classes: Block, Base"),
        ("my_models.many:Y", {}, "its classes: X0, X1, X2, X3, X4, X5 and 64 more$"),
        ("my_models.netz:WideNet", {}, "no module netz in .*my_models"),
        ("my_models.broken:Net", {}, r"broken\.py:1: invalid syntax"),
        ("my_models.nets:WideNet", {"deph": 3}, "did you mean depth.*width: int = 64, .*depth=3"),
        ("my_models:WideNet", {"deph": 3}, "did you mean depth"),
        ("my_models.deep:Deep", {"deph": 3}, "did you mean depth"),
        ("my_models.nets:Inherits", {"deph": 3}, "did you mean depth"),
        ("my_models.nets:FromElsewhere", {"group": 3}, "did you mean groups"),
        ("my_models.nets:NeedsRank", {}, "missing a required argument: 'rank'"),
        ("my_models.nets:Timeless", {}, r"Timeless: its forward takes \(x\), expected .* \(x, t\)"),
        (
            "my_models.nets:TimeFirst",
            {},
            r"forward takes \(t: Tensor, x_t, y=None\), expected \(x, t\): put them in this order",
        ),
        ("my_models.nets:make", {}, "make is a function, expected a subclass of torch.nn.Module"),
        ("my_models.nets:Config", {}, "Config is not a subclass of torch.nn.Module"),
        ("my_models.nets:NoDim", {}, r"takes no argument that the data's width could be"),
    ],
)
def test_a_mistake_that_the_source_shows(
    arch: str, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(arch, **arguments)


@pytest.mark.parametrize(
    "arch",
    [
        *(
            f"my_models.nets:{name}"
            for name in ("Open", "Decorated", "New", "Unknown", "Either", "Alias", "made")
        ),
        *(f"my_models.{name}:Net" for name in ("lazy", "attached", "borrowed")),
        "my_models.star:Block",
        "my_models.made:A",
        "my_models.nets.more:Net",  # as six.moves is one
        "torch.nn:Nothing",  # torch's own source makes names
        "collections:OrderedDict",
    ],
)
def test_what_is_not_certain_is_left_to_the_start(arch: str) -> None:
    check(arch, anything=1)


def test_what_is_right_passes() -> None:
    check("mlp", width=64, dropout=0, depth=2)
    check("my_models.nets:WideNet", width=3, depth=1)
    check("my_models.nets:NeedsRank", rank=2)
    check("my_models.deep:Deep", depth=1)
    check("my_models.nets:Assigned")
    check("my_models.nets:Tokens")


def test_an_arch_is_checked_without_importing_it() -> None:
    check_arch(TrainingConfig(arch="mlp"))
    check_arch(TrainingConfig(arch="short=torch.nn:Module"))
    with pytest.raises(ConfigError, match="found 'mpl', expected one of mlp"):
        check_arch(TrainingConfig(arch="mpl"))


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("nowhere.models:Net", "no module nowhere"),
        ("my_models/nets.py:Net", "found .*, expected package.module:name, .* my_models.nets:Net?"),
        ("./my_models.py:Net", "did you mean my_models:Net?"),
        ("wide=my_models.py:Net", "found 'wide=.*did you mean my_models:Net?"),
        ("./:Net", "expected package.module:name, as Python imports it$"),
        ("/lab/my_models.py:Net", "expected package.module:name, as Python imports it$"),
        (".my_models:Net", "expected package.module:name, as Python imports it"),
        ("__main__:Net", "the script or notebook itself, which no job can import"),
    ],
)
def test_what_is_no_module_is_said(arch: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        check_arch(TrainingConfig(arch=arch))
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        check_flow(TrainingConfig(flow=arch))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import torch, einopsx.layers\n", ["my_nets.py:1 imports einopsx, which is not"]),
        (
            "\nfrom einopsx import rearrange, reduce\n",
            ["my_nets.py:2 imports einopsx, which is not"],
        ),
        ("import beside\n", ["beside.py:2 imports einopsx, which is not installed here"]),
        ("from .blocks import Block\n", ["my_nets.py:1 has a relative import beyond its top"]),
        ("import nets\n", ["nets/inner.py:1 has a relative import beyond its top"]),
        ("try:\n    import einopsx\nexcept ImportError:\n    einopsx = None\n", []),
        ("def forward():\n    import einopsx\n", []),
        ("import sys\nsys.path.insert(0, 'vendored')\nimport einopsx\n", []),
        ("from __future__ import annotations\nimport os.path, __main__\n", []),
        ("import (\n", []),  # which is said where its classes are looked up
    ],
)
def test_an_import_that_surely_fails_is_named(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: list[str]
) -> None:
    (workplace / "nets").mkdir()
    for name, text in (
        ("my_nets", source),
        ("beside", "import torch\nimport einopsx\n"),
        ("nets/__init__", "from .inner import Net\n"),
        ("nets/inner", "from ..outer import Net\n"),
    ):
        (workplace / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(workplace)
    found = missing_imports(["my_nets"])
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True)), found
