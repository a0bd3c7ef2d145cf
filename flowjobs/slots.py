"""How many runs share the job that this process is in."""

import os
from collections.abc import Mapping

# In the environment of each run of a job that trains several at once: how many.
SLOTS = "FLOWJOBS_SLOTS"


def runs_that_share(environment: Mapping[str, str] = os.environ) -> int:
    """How many runs share the job's processors, memory and GPU; 1 where it is a run's alone."""
    number = environment.get(SLOTS, "")
    return int(number) if number.isdigit() and int(number) else 1
