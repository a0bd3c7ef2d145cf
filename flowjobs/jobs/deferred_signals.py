"""Signals that end a command wait from sbatch's start until the job that it accepts is noted."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from flowjobs.jobs.executors import Cluster

# Ctrl-C, an end by `kill` or `timeout`, a terminal that is closed.
TOLD_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_deferred(*numbers: signal.Signals) -> Iterator[None]:
    """Keep signals waiting while the block lasts: a job that nobody noted could not be cancelled.

    Not by a mask: the signal may reach another thread, and Python handles it in the main one.

    Args:
        numbers: Which ones; default: all that end a command.
    """
    before: dict[signal.Signals, Any] = {}
    came: list[int] = []
    # Python lets no other thread set a handler.
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers or TOLD_TO_END}
    # None is a handler that Python has not set, and could not put back.
    kept = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in kept:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        for told in came[:1]:
            signal.raise_signal(told)


@contextlib.contextmanager
def signals_deferred_until_noted(cluster: Cluster) -> Iterator[None]:
    """Keep signals that end a command waiting, from sbatch's start until the job is noted."""
    # sbatch gets Ctrl-C at a terminal too, and inherits the mask; so would a job on this machine.
    shielded = set(TOLD_TO_END) if cluster == "slurm" else set()
    with signals_deferred():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, shielded)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
