"""Signals only set a flag; the training loop asks for it at each step boundary."""

import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

# What asks a run to save and leave: USR2 comes from --signal and from a scheduler that sends the
# user signal on preemption, TERM from one that does not, INT from a user at a terminal, and HUP
# from a terminal that is closed.
REASONS = {
    signal.SIGUSR2: "told to leave (SIGUSR2)",
    signal.SIGTERM: "told to leave (SIGTERM)",
    signal.SIGINT: "interrupted by Ctrl-C",
    signal.SIGHUP: "told to leave (SIGHUP)",
}
# The watchdog leaves before it would be killed: by a fifth of the time there is, at most 5 s.
MARGIN_SHARE = 0.2
MARGIN_MAX_S = 5.0


class StopSignals:
    """While the block lasts, notes the first signal that asks the run to leave.

    Replaces submitit's handlers, which save in the middle of whatever the process was doing (an
    optimizer step, say) and requeue a job even if its user has just cancelled it.

    Args:
        seconds_left: Asked, in a thread of its own, how long after a signal the process may still
            live; None: as long as it wants.
        too_late: Called when the block is still not left shortly before that; the main thread
            hangs then, in a data source or a collective. It should end the process.
        process_ends: Whether the process ends with the block: a signal that comes still later must
            not make a death of the outcome, so it is ignored.
    """

    def __init__(
        self,
        seconds_left: Callable[[signal.Signals], float | None] = lambda number: None,
        too_late: Callable[[], None] = lambda: None,
        *,
        process_ends: bool = False,
    ) -> None:
        self._seconds_left = seconds_left
        self._too_late = too_late
        self._process_ends = process_ends
        self._signal: signal.Signals | None = None
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}
        self._over = threading.Event()

    def __enter__(self) -> "StopSignals":
        # Python runs a handler between two bytecodes of the main thread, never while that one
        # hangs in C. The byte written here comes at once, to the thread that watches.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # A forked worker has the pipe too: a signal to it would start the parent's watchdog.
        os.register_at_fork(after_in_child=self._forget_in_child)
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()
        for number in REASONS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # a job on this machine is started so, to outlive Ctrl-C at the terminal
            self._previous[number] = signal.signal(number, self._note)
        self._armed_after_imports = False
        # A batch script may start the process with these blocked, so that none is lost, or kills
        # it, before there is a handler.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._previous)
        return self

    def __exit__(self, *error: object) -> None:
        self.stand_down()
        # First the old descriptor: a signal in between would write to a closed pipe.
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._writer)  # ends the watching thread
        for number, handler in self._previous.items():
            after = signal.SIG_IGN if self._process_ends else handler
            signal.signal(number, after)  # type: ignore[arg-type]

    def reason(self) -> str | None:
        """Why the run should stop; None if it should not."""
        if not self._armed_after_imports:
            # Asked after the first step: a user's module, or what it imports, may have set
            # handlers of its own (SIG_DFL so that Ctrl-C ends a plot, say).
            self._armed_after_imports = True
            for number in self._previous:
                signal.signal(number, self._note)
        return None if self._signal is None else REASONS[self._signal]

    def received(self) -> signal.Signals | None:
        """The first signal that came."""
        return self._signal

    def stand_down(self) -> None:
        """The state is saved: there is nothing left to watch over."""
        self._over.set()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Slurm signals every process of a step; a forked worker inherits this handler.
        if os.getpid() != self._pid:
            return
        if self._signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: the user does not want to wait
        if self._signal is None:
            self._signal = signal.Signals(number)

    def _forget_in_child(self) -> None:
        if not self._over.is_set():
            signal.set_wakeup_fd(-1)

    def _watch(self) -> None:
        deadline: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            while True:
                wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not selector.select(wait_s):
                    # The state may have been saved since the signal, and the end take long.
                    if not self._over.is_set():
                        self._too_late()
                    return
                numbers = os.read(self._reader, 64)
                if not numbers:
                    # Here and not in __exit__: closed under a select, its number may be another's.
                    os.close(self._reader)
                    return
                for number in numbers:
                    if number in self._previous and not self._over.is_set():
                        deadline = self._sooner(deadline, signal.Signals(number))

    def _sooner(self, deadline: float | None, number: signal.Signals) -> float | None:
        told_at = time.monotonic()
        seconds = self._seconds_left(number)
        if seconds is None:
            return deadline
        found = told_at + seconds - min(MARGIN_MAX_S, MARGIN_SHARE * seconds)
        return found if deadline is None else min(deadline, found)
