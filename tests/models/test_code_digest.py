"""Which edits of a model make it another one, and which do not."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from flowjobs.models.code_digest import code_digest, differ
from flowjobs.models.mlp import MLP

CELL = """
import torch
from torch import nn

def scaled(t): return 1000 * t

def shifted(t): return t + 0

def built(act):
    class Net(nn.Module):
        def __init__(self, drop=0.1, *, depth=1):
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(drop))

        @property
        def rate(self): return 2.0

        @torch.no_grad()
        def embedded(self, t): return t.sin()

        def forward(self, x, t):
            assert x.dim() in {1, 2}
            t = torch.stack([shifted(of) for of in t]) * self.rate
            return act(self.parts(x)) + self.embedded(scaled(t))[:, None]
    return Net
model = built(torch.tanh)()
"""


def digest(cell: str = CELL, **others: Any) -> str:
    names = {"__name__": "__main__", **others}
    exec(compile(cell, "<ipython-input-1>", "exec"), names)
    assert names["model"](torch.ones(2, 3), torch.ones(2)).shape == (2, 3)
    return code_digest(names["model"])


@pytest.mark.parametrize(
    ("before", "after", "is_other"),
    [
        ("self.embedded(", "self.embedded(-", True),
        ("1000", "100", True),
        ("t.sin()", "t.cos()", True),
        ("built(torch.tanh)", "built(torch.relu)", True),
        ("nn.ReLU()", "nn.GELU()", True),
        ("drop=0.1", "drop=0.2", True),
        ("depth=1", "depth=2", True),
        ("t + 0", "t + 1", True),
        ("return 2.0", "return 3.0", True),
        ("{1, 2}", "{2, 3}", True),
        ("return act(", "# as in the paper\n\n            return act(", False),
        ("def scaled(t): return", "def scaled(t):\n    'As in the paper.'\n    return", False),
        ("model = ", "embedded = print\nmodel = ", False),
    ],
)
def test_what_is_computed_counts_and_not_how_it_is_written(
    before: str, after: str, is_other: bool
) -> None:
    assert before in CELL
    assert differ(digest(), digest(CELL.replace(before, after))) is is_other


def test_another_process_has_the_same_digest_and_another_python_says_nothing() -> None:
    text = f"{CELL}\nfrom flowjobs.models.code_digest import code_digest\nprint(code_digest(model))"
    said = {
        subprocess.run(
            [sys.executable, "-c", text.replace("{1, 2}", "{'a', 'b', 2}")],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(said) == 1
    assert not differ("3.11:aa", "3.12:bb")
    assert not differ("", "3.12:bb")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_a_model_that_is_compiled_or_trained_is_the_same() -> None:
    model: Any = MLP(3, 8)
    before = code_digest(model)
    assert code_digest(nn.Module.to(torch.compile(model), "cpu")) == before  # type: ignore[arg-type]
    for _ in range(50):  # Python specializes what is called often
        model(torch.ones(2, 3), torch.ones(2))
    assert code_digest(model) == before
