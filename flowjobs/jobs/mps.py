"""CUDA's Multi-Process Service: runs that share a GPU compute at once instead of in turns.

Its daemon belongs to the job and its user; it needs no administrator. No test has seen it on a GPU.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

from flowjobs.errors import ConfigError

CONTROL = "nvidia-cuda-mps-control"
ANSWERS_WITHIN_S = 30.0


@contextlib.contextmanager
def mps_daemon() -> Iterator[dict[str, str]]:
    """Run the daemon for as long as the block lasts.

    Yields:
        The variables that make a process a client of it.

    Raises:
        ConfigError: There is none on this machine, or it does not start.
    """
    if shutil.which(CONTROL) is None:
        raise ConfigError(f"MPS: {CONTROL} is not on PATH")
    folder = tempfile.mkdtemp(prefix="flowjobs-mps-")
    variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    try:
        _control("-d", variables)
        try:
            # The daemon numbers the GPUs that it sees anew, and a job whose runs share has one.
            yield variables | {"CUDA_VISIBLE_DEVICES": "0"}
        finally:
            with contextlib.suppress(ConfigError):
                _control(None, variables, "quit\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _control(flag: str | None, variables: dict[str, str], command: str = "") -> None:
    # A session of its own: a signal to the job's processes is for the runs, which save, and need
    # it until they have.
    try:
        done = subprocess.run(
            [CONTROL, *([flag] if flag else [])],
            env={**os.environ, **variables},
            input=command,
            text=True,
            stdout=subprocess.DEVNULL,  # the daemon would hold a pipe open
            stderr=subprocess.DEVNULL,
            timeout=ANSWERS_WITHIN_S,
            check=False,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"MPS: {CONTROL}: {error}") from error
    if done.returncode != 0:
        raise ConfigError(f"MPS: {CONTROL} ended with exit code {done.returncode}")
