"""When checkpoints are written, and by whom: a thread beside the training.

The rule: best.pt on disk is never behind the best loss that last.pt on disk remembers. So a save
writes the pending best first, and a run killed in between repeats steps, never loses a best.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from flowjobs.data.read_ahead import HangsError, result_of
from flowjobs.errors import CheckpointWriteError, RunTakenOverError
from flowjobs.training.checkpoint import Payload, bytes_of, on_cpu, write_checkpoint
from flowjobs.training.snapshot import Snapshot

logger = logging.getLogger(__name__)

# Saving may take this share of the training's time, so the interval follows what a save costs.
COST_SHARE = 0.01
# What a save is taken to cost before there was one: the first comes after ten seconds.
FIRST_COST_S = 0.1
# Without a finished epoch in between, save after this long all the same.
LONGEST_INTERVAL_S = 300.0
# A write that takes longer than the first is spoken of as the training continues (and again after
# four times as long); than the second, and what its bytes take on a slow disk, not waited for.
SAY_AFTER_S = 60.0
WAIT_S = 600.0
SLOWEST_BYTES_PER_S = 10e6
# How long an error waits for it, before it is told.
WAIT_AFTER_ERROR_S = 60.0


class CheckpointSaver:
    """Writes best.pt and last.pt without stalling the step.

    Args:
        best: The path of best.pt.
        last: The path of last.pt.
        flush_rows: Called in the writing thread; returns when the record of the run, which must
            never be behind last.pt, is on the disk. Rows that are not there when the node goes
            down would not come again after this checkpoint.
        every_s: Seconds after which a save comes in the middle of an epoch too.
        before_replace: Called in the writing thread before a file takes its name; a
            RunTakenOverError from it ends all writing.
        check: Called in the writing thread with a state before it is written; what it raises
            keeps the state from the disk, and reaches the training when it next looks.
        saved: Called in the training's thread with the seconds that it was held up.

    Attributes:
        taken_over: What `before_replace` raised in the background, if it did.
    """

    def __init__(
        self,
        best: Path,
        last: Path,
        flush_rows: Callable[[], None] = lambda: None,
        every_s: float | None = None,
        before_replace: Callable[[], None] = lambda: None,
        check: Callable[[Payload], None] = lambda payload: None,
        saved: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._best = best
        self._last = last
        self._flush_rows = flush_rows
        self._longest_interval_s = LONGEST_INTERVAL_S if every_s is None else every_s
        self._before_replace = before_replace
        self._check = check
        self._saved = saved
        self.taken_over: RunTakenOverError | None = None
        self._pending_best: Snapshot | None = None
        self._best_in_write: Snapshot | None = None
        self._spare: Snapshot | None = None
        # One at a time: files are written in the order in which they were asked for.
        self._write: Future[float] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._size = 0
        self._say_after_s = SAY_AFTER_S
        self._stall_s = 0.0
        # Who asks for an interval knows what a save costs here; the second one is measured.
        self._cost_s = FIRST_COST_S if every_s is None else 0.0
        self._saved_at = time.monotonic()
        self._warned_of: str | None = None

    def keep_best(self, payload: Payload, *, held: bool = False) -> None:
        """Take a copy of the state; the next save writes it to best.pt.

        Args:
            payload: The state.
            held: See `Snapshot.of`.
        """
        started = time.monotonic()
        reuse = self._pending_best or self._spare
        self._pending_best = Snapshot.of(payload, reuse, held=held)
        self._spare = None
        self._note_stall(started)

    def due(self, *, epoch_finished: bool) -> bool:
        """Whether a save is worth its time now."""
        if self._write is not None:
            # On a slow disk saves are left out: each in a queue would hold a copy of the state.
            if not self._write.done():
                self._say_slow()
                return False
            self._collect()
        if self.taken_over:
            return False
        elapsed = time.monotonic() - self._saved_at
        affordable = elapsed * COST_SHARE >= self._cost_s
        return affordable and (epoch_finished or elapsed >= self._longest_interval_s)

    def save(self, payload: Payload) -> None:
        """Copy the state now and write it beside the training.

        A write that fails is logged and tried again when the next save is due.
        """
        self._collect()
        started = time.monotonic()
        # A copy: the next step changes the tensors while the thread writes.
        state = Snapshot.of(payload).payload
        self._best_in_write, self._pending_best = self._pending_best, None
        self._note_stall(started)
        self._saved_at = time.monotonic()
        self._say_after_s = SAY_AFTER_S
        self._begin_write(_payload_of(self._best_in_write), state)

    def save_and_wait(
        self, payload: Payload, prove: Callable[[Payload, Path], None] | None = None
    ) -> None:
        """Write the state and return when it is on disk.

        Args:
            payload: The state.
            prove: See `write_checkpoint`.

        Raises:
            CheckpointWriteError: It could not be written; the text names the path and the reason.
            RunTakenOverError: Another attempt holds the run; nothing was written.
        """
        started = time.monotonic()
        self._collect()
        if self.taken_over:
            raise self.taken_over
        # No copy: nothing trains while this waits.
        if prove is None:
            self._begin_write(_payload_of(self._pending_best), payload)
            self._result()
        else:  # it builds a model, which may depend on what holds for this thread
            self._write_both(_payload_of(self._pending_best), payload, prove)
        self._pending_best = None
        self._saved(time.monotonic() - started)

    def close(self) -> None:
        """Wait for the write under way.

        Raises:
            CheckpointWriteError: It does not come to its end.
        """
        self._collect()

    def close_after_error(self) -> None:
        """Wait for the write under way, but not for one that hangs: the error is to be told."""
        try:
            self._collect(WAIT_AFTER_ERROR_S + self._size / SLOWEST_BYTES_PER_S)
        except CheckpointWriteError as error:
            logger.error("%s", error)

    def _note_stall(self, since: float) -> None:
        seconds = time.monotonic() - since
        self._stall_s += seconds
        self._saved(seconds)

    def _begin_write(self, best: Payload | None, state: Payload) -> None:
        self._size = bytes_of(state) + (bytes_of(best) if best else 0)
        there = self._beside_the_steps() if bytes_of(state, on_gpu=True) else nullcontext()
        write: Future[float] = Future()
        self._write = write

        def work() -> None:
            try:
                with there:
                    write.set_result(self._write_both(best, state))
            except BaseException as error:  # whoever waits for the result raises it
                write.set_exception(error)

        # A daemon: one that hangs in a dead file system must not keep the process from its end.
        threading.Thread(target=work, name="checkpoint", daemon=True).start()

    def _beside_the_steps(self) -> AbstractContextManager[object]:
        """Where copies from the GPU do not wait for the steps that are launched by then."""
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())  # for the copies there
        return torch.cuda.stream(self._stream)

    def _result(self, wait_s: float | None = None) -> float:
        """What the write under way gives, or raises: a CheckpointWriteError if it hangs."""
        write, self._write = self._write, None
        assert write is not None
        if wait_s is None:
            wait_s = WAIT_S + self._size / SLOWEST_BYTES_PER_S
        try:
            return result_of(write, wait_s, f"{self._last} has not been written")
        except HangsError as error:
            raise CheckpointWriteError(
                f"{error.strerror}: does its file system answer? The checkpoint that was there "
                "before still is"
            ) from error
        except KeyboardInterrupt:  # of the wait, in a notebook: the write is under way yet
            self._write = write
            raise

    def _say_slow(self) -> None:
        waited_s = time.monotonic() - self._saved_at
        if waited_s >= self._say_after_s:
            logger.warning(
                "%s has not been written for %.0f s: training continues, and would resume from the "
                "one before",
                self._last,
                waited_s,
            )
            self._say_after_s *= 4

    def _write_both(
        self,
        best: Payload | None,
        state: Payload,
        prove: Callable[[Payload, Path], None] | None = None,
    ) -> float:
        # The thread's CPU time: while it waits for the disk the training has its core.
        started = time.thread_time()
        best, state = best and on_cpu(best), on_cpu(state)
        for payload in (best, state):
            if payload is not None:
                self._check(payload)
        try:
            self._flush_rows()
        except OSError as error:
            raise CheckpointWriteError(
                f"{self._last} is not written before the rows of its steps, and the record of "
                f"these could not be: {error.strerror}"
            ) from error
        # Before last.pt: killed in between, the run repeats steps and loses no best.
        if best is not None:
            write_checkpoint(self._best, best, self._before_replace)
        size = write_checkpoint(self._last, state, self._before_replace, prove)
        logger.debug("saved step %d to %s (%d bytes)", state["step"], self._last, size)
        return time.thread_time() - started

    def _collect(self, wait_s: float | None = None) -> None:
        if self._write is None:
            return
        try:
            self._cost_s = self._stall_s + self._result(wait_s)
            self._spare = self._best_in_write
            self._warned_of = None
        except CheckpointWriteError as error:
            if isinstance(error.__cause__, HangsError):
                raise  # it may write yet: another one at the same time must not
            self._warn(error)
            # A newer best may have come while the write that failed was under way.
            self._pending_best = self._pending_best or self._best_in_write
        except RunTakenOverError as error:
            self.taken_over = error
        self._stall_s = 0.0

    def _warn(self, error: CheckpointWriteError) -> None:
        """Say it once a cause, until a save succeeds: a full disk can stay full for days."""
        cause = error.__cause__
        kind = cause.strerror if isinstance(cause, OSError) else type(cause).__name__
        level = logging.DEBUG if kind == self._warned_of else logging.WARNING
        logger.log(level, "%s; training continues, and the next save tries again", error)
        self._warned_of = kind


def _payload_of(snapshot: Snapshot | None) -> Payload | None:
    return snapshot.payload if snapshot else None
