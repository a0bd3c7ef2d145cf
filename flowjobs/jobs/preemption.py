"""Signals only set a flag; the training loop asks for it at each step boundary."""

import os
import signal
from types import FrameType, TracebackType

# What asks a run to save and leave: USR2 comes from --signal and from a scheduler that sends the
# user signal on preemption, TERM from one that does not, INT from a person at a terminal.
REASONS = {
    signal.SIGUSR2: "preempted or at the time limit (SIGUSR2)",
    signal.SIGTERM: "preempted or cancelled (SIGTERM)",
    signal.SIGINT: "interrupted by Ctrl-C",
}


class StopSignals:
    """While the block lasts, notes the first signal that asks the run to leave.

    Replaces submitit's handlers, which save in the middle of whatever the process was doing (an
    optimizer step, say) and requeue a job even if its user has just cancelled it.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}

    def __enter__(self) -> "StopSignals":
        for number in REASONS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # a job on this machine is started so, to outlive Ctrl-C at the terminal
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reason(self) -> str | None:
        """Why the run should leave, in words for a person; None to go on."""
        return None if self._signal is None else REASONS[self._signal]

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Slurm signals every process of a step; a forked worker inherits this handler.
        if os.getpid() != self._pid:
            return
        if self._signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: a person does not want to wait
        if self._signal is None:
            self._signal = signal.Signals(number)
