"""A model that computes on the GPU until it is told to go on, or how to go wrong."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

# Of its calls in training, where it waits: in the third epoch of the digits by 128 rows.
HELD_AT = 30
# More than any GPU has.
TOO_MANY_BYTES = 2**43


class HeldModel(nn.Module):
    """One linear layer that waits in one step for what a file says.

    Args:
        dim: Width of the data.
        control: The file: "go on", or what goes wrong. Once it waits, there is a file
            "control-there" beside it.
    """

    def __init__(self, dim: int, control: str) -> None:
        super().__init__()
        self.layer = nn.Linear(dim + 1, dim)
        self.control = Path(control)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls == HELD_AT:
                self._obey(x.device)
        return self.layer(torch.cat([x, t[:, None]], dim=1))

    def _obey(self, device: torch.device) -> None:
        self.control.with_name(f"{self.control.name}-there").touch()
        while not (told := self._told()):
            torch.ones(256, 256, device=device).mm(torch.ones(256, 256, device=device)).sum().item()
            time.sleep(0.005)
        match told:
            case "raise":
                raise ValueError("the model was told to fail")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "memory":
                torch.empty(TOO_MANY_BYTES, dtype=torch.uint8, device=device)
            case "index":
                torch.zeros(4, device=device)[torch.full((1,), 9, device=device)].sum().item()
            case "go on":
                pass
            case _:
                raise ValueError(told)

    def _told(self) -> str:
        try:
            return self.control.read_text()
        except FileNotFoundError:
            return ""
