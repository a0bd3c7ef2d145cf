"""Waiting for something that another process does."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class ClusterError(RuntimeError):
    """The cluster did not do what it was asked to do."""


def wait_until(
    poll: Callable[[], Result | None],
    what: str,
    timeout_s: float,
    explain: Callable[[], str] = str,
) -> Result:
    """Polls until the answer is truthy and returns it.

    Args:
        poll: asked every 50 ms.
        what: what is waited for, for the error text.
        timeout_s: how long it may take.
        explain: called on a time-out; its text ends the error's.

    Raises:
        ClusterError: the time is over.
    """
    end = time.monotonic() + timeout_s
    while True:
        answer = poll()
        if answer:
            return answer
        if time.monotonic() > end:
            raise ClusterError(f"waited {timeout_s:g} s in vain for {what}\n{explain()}".rstrip())
        time.sleep(0.05)
