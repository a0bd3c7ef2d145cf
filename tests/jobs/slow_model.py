"""A model that takes its time, so that a job can be disturbed while it trains, or goes wrong."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from flowjobs.evaluation.sampling import CHUNK
from flowjobs.jobs.signals import StopSignals

# A job that nobody tells anything goes on all the same.
AWAITS_AT_MOST_S = 900.0


class SlowModel(nn.Module):
    """One linear layer that in each training step does what a file tells it to.

    Args:
        dim: Width of the data.
        control: The file; "await 10" lets a job get no further than step 10 before it is told to
            leave, however late on a busy machine; "sampling" lets it draw no samples before that;
            "hold" stops the step until the file says something else; "raise", "memory" and so on
            are what goes wrong, "no GPU on n1" as it is made there; "1:raise" is for rank 1 alone,
            one line a rank. Without the file, a step takes a moment. A process that a test keeps
            from going on has a file "control-PID" beside it.
        pause_s: The moment.
    """

    def __init__(self, dim: int, control: str, pause_s: float = 0.05) -> None:
        super().__init__()
        self.layer = nn.Linear(dim + 1, dim)
        self.control = Path(control)
        self.pause_s = pause_s
        self.steps = 0
        self.awaited_s = 0.0
        if self._told() == f"no GPU on {os.environ.get('SLURMD_NODENAME')}":
            raise RuntimeError("CUDA error: the job was given a GPU, and torch finds none")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self._obey()
        elif len(x) == CHUNK:
            while self._told() == "sampling" and self._awaits_signal("await -1"):
                self._wait_a_moment()
        return self.layer(torch.cat([x, t[:, None]], dim=1))

    def _obey(self) -> None:
        self.steps += 1
        time.sleep(self.pause_s)
        while (told := self._told()) == "hold" or self._awaits_signal(told):
            self._wait_a_moment()
        match told:
            case "raise":
                raise ValueError("the model was told to fail")
            case "file system":
                raise OSError(5, "Input/output error", "/scratch")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit 15":
                os._exit(15)
            case "memory":
                self.hoard = [bytes(range(256)) * 2**22 for _ in range(4)]
                time.sleep(30)

    def _wait_a_moment(self) -> None:
        self.control.with_name(f"{self.control.name}-{os.getpid()}").touch()
        time.sleep(0.1)

    def _awaits_signal(self, told: str) -> bool:
        command, _, step = told.partition(" ")
        if command != "await" or self.steps <= int(step) or self.awaited_s > AWAITS_AT_MOST_S:
            return False
        handler = signal.getsignal(signal.SIGTERM)
        noted = getattr(handler, "__self__", None)
        if isinstance(noted, StopSignals) and noted.received():
            self.control.unlink(missing_ok=True)  # the next start is on its own
            return False
        self.awaited_s += 0.1
        return True

    def _told(self) -> str:
        try:
            told = self.control.read_text()
        except FileNotFoundError:
            return ""
        if ":" not in told:
            return told
        of_rank = dict(line.split(":") for line in told.splitlines())
        return of_rank.get(os.environ.get("RANK", "0"), "")
