"""Processes that have imported torch before they start: forked from one that waits for them.

A start in a tenth of a second makes it affordable to kill a run a hundred times, and lets the
kills hit training and saves rather than imports.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = [
    "__main__",
    "flowjobs.cli.main",
    "flowjobs.jobs.tasks",
    "flowjobs.runs.recorder",
    "flowjobs.training.run_training",
]


def start(target: Callable[..., None], *arguments: object, log: Path) -> BaseProcess:
    """Start `target(*arguments)` in the present working directory; its output goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(Path.cwd(), log, target, arguments))
    process.start()
    return process


def _run(
    folder: Path, log: Path, target: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # The waiting process ignores Ctrl-C, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)
