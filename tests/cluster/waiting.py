"""Waiting for something that another process does."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

# On a machine that is busy with other work minutes come of seconds; a test that hangs is ended by
# its own time-out.
AT_LEAST_S = 600.0
# What one of Slurm's commands says that got no answer in time, and may get one at the next look.
NO_ANSWER = re.compile("timed out|Unable to contact|no end after")

Result = TypeVar("Result")


class ClusterError(RuntimeError):
    """The cluster did not do what it was asked to do."""


def wait_until(
    poll: Callable[[], Result | None],
    what: str,
    timeout_s: float,
    explain: Callable[[], str] = str,
    at_least_s: float = AT_LEAST_S,
) -> Result:
    """Polls until the answer is truthy and returns it.

    Args:
        poll: asked every 50 ms.
        what: what is waited for, for the error text.
        timeout_s: how long it may take, on a machine that has time.
        explain: called on a time-out; its text ends the error's.
        at_least_s: how long it is waited for all the same; 0 where there is another way.

    Raises:
        ClusterError: the time is over.
    """
    timeout_s = max(timeout_s, at_least_s)
    end = time.monotonic() + timeout_s
    while True:
        try:
            answer = poll()
        except ClusterError as error:
            if time.monotonic() > end or not NO_ANSWER.search(str(error)):
                raise
            answer = None
        if answer:
            return answer
        if time.monotonic() > end:
            raise ClusterError(f"waited {timeout_s:g} s in vain for {what}\n{explain()}".rstrip())
        time.sleep(0.05)
