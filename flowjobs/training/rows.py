"""The rows that a run logs: all to its record, and now and then one to its log.

A GPU that replays its steps would wait while a row is read from it and written. Such a row comes
late: when the next step is launched, but before anything is saved, and before the run leaves.
"""

import logging
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from flowjobs.config import TrainingConfig
from flowjobs.errors import TrainingDivergedError
from flowjobs.runs.recorder import Recorder

logger = logging.getLogger(__name__)

SAY_EVERY_S = 10.0

Row = dict[str, float]


class Logged:
    """What a step has to log, on its way from the device."""

    def __init__(self, loss: Tensor, grad_norm: Tensor, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._values = torch.stack([loss.double(), grad_norm.double()])
        self._copied: torch.cuda.Event | None = None
        if self._values.is_cuda:
            self._values = self._values.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def row(self) -> Row:
        """The values, once they are there."""
        if self._copied:
            self._copied.synchronize()
        loss, grad_norm = self._values.tolist()
        return {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": float(self._learning_rate),
        }


class Rows:
    """Takes the rows of one attempt, in the order of their steps.

    Args:
        config: The run's.
        steps_per_epoch: Optimizer steps of an epoch.
        recorder: Where they go; the first rank has one, and a run of a job.
        says: Whether this rank says how far the run is.
    """

    def __init__(
        self,
        config: TrainingConfig,
        steps_per_epoch: int,
        recorder: Recorder | None,
        *,
        says: bool,
    ) -> None:
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._recorder = recorder
        self._says = says
        self._said_at = time.monotonic()
        self._late: tuple[int, Logged | Row] | None = None

    def take(
        self, step: int, row: Logged | Row, *, late: bool = False, is_last: bool = False
    ) -> None:
        """Write a row, or keep it until `write_late` is called.

        Args:
            step: Steps that are done.
            row: Its values.
            late: Whether to keep it.
            is_last: Whether it is the run's last.

        Raises:
            TrainingDivergedError: A value of a step is not finite.
        """
        if late:
            self._late = step, row
        elif isinstance(row, Logged):
            self._write(step, self.finite(step, row.row()), is_last)
        else:
            self._write(step, row, is_last)

    def write_late(self) -> None:
        """Write what was taken late; see `take`."""
        late, self._late = self._late, None
        if late:
            self.take(*late)

    def finite(self, step: int, row: Row) -> Row:
        """The same row.

        Raises:
            TrainingDivergedError: A value is not finite.
        """
        for key, value in row.items():
            if not math.isfinite(value):
                raise TrainingDivergedError(
                    f"{key} is {value} at step {step}: lower --lr "
                    f"({self._config.lr}) or --grad-clip ({self._config.grad_clip})"
                )
        return row

    def _write(self, step: int, row: Row, is_last: bool) -> None:
        epoch, after = (step - 1) // self._steps_per_epoch, step // self._steps_per_epoch
        # Asked at steps that are logged: an epoch of many rows takes an hour.
        if self._says and (is_last or time.monotonic() - self._said_at > SAY_EVERY_S):
            total = self._config.epochs * self._steps_per_epoch
            logger.info(
                "epoch %d/%d  step %d/%d  %s",
                *(after, self._config.epochs, step, total, _losses(row)),
            )
            self._said_at = time.monotonic()
        if self._recorder:
            self._recorder.record({"step": step, "epoch": epoch, **row})


def _losses(row: Mapping[str, float]) -> str:
    if "val/loss" in row:
        return f"val/loss {row['val/loss']:.4f}  best {row['val/best_loss']:.4f}"
    return f"train/loss {row['train/loss']:.4f}"
