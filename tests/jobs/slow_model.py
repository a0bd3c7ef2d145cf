"""A model that takes its time, so that a job can be disturbed while it trains, or goes wrong."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

PAUSE_S = 0.05


class SlowModel(nn.Module):
    """One linear layer that in each training step does what a file tells it to.

    Args:
        dim: Width of the data.
        control: The file; "hold" stops the step until the file says something else, "raise",
            "memory" and so on are what goes wrong. Without the file, a step takes a moment.
    """

    def __init__(self, dim: int, control: str) -> None:
        super().__init__()
        self.layer = nn.Linear(dim + 1, dim)
        self.control = Path(control)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self._obey()
        return self.layer(torch.cat([x, t[:, None]], dim=1))

    def _obey(self) -> None:
        time.sleep(PAUSE_S)
        while (told := self._told()) == "hold":
            time.sleep(0.1)
        match told:
            case "slow":
                time.sleep(1)
            case "raise":
                raise ValueError("the model was told to fail")
            case "file system":
                raise OSError(5, "Input/output error", "/scratch")
            case "exit 15":
                os._exit(15)
            case "memory":
                self.hoard = [bytes(range(256)) * 2**22 for _ in range(4)]
                time.sleep(30)

    def _told(self) -> str:
        try:
            return self.control.read_text()
        except FileNotFoundError:
            return ""
