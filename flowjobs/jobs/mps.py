"""CUDA's Multi-Process Service: runs that share a GPU compute at once instead of in turns.

Its daemon belongs to the job and its user; it needs no administrator.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flowjobs.errors import ConfigError
from flowjobs.slots import runs_that_share

CONTROL = "nvidia-cuda-mps-control"
PIPE_FOLDER = "CUDA_MPS_PIPE_DIRECTORY"
ANSWERS_WITHIN_S = 30.0
# The first on a node of many GPUs, whose driver was not in use.
COMPUTES_WITHIN_S = 120.0
# A client that hangs is not waited for: the job that ends may have been told to leave, and has
# still to be requeued.
CLIENTS_END_WITHIN_S = 5
REMOVED_WITHIN_S = 2.0
# The daemon starts its server for the first client, and where that fails (a container without
# shared memory, a virtual machine) every client fails. Without libcuda there is none.
CLIENT = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit()
context = ctypes.c_void_p()
if code := cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0):
    sys.exit(f"CUDA error {code}")
"""


@contextlib.contextmanager
def mps_daemon() -> Iterator[dict[str, str]]:
    """Run the daemon for as long as the block lasts.

    Yields:
        The variables that make a process a client of it.

    Raises:
        ConfigError: There is none on this machine, it does not start, or no process can compute
            as its client.
    """
    if shutil.which(CONTROL) is None:
        raise ConfigError(f"MPS: {CONTROL} is not on PATH")
    # Not in TMPDIR: the path of a socket has 107 characters at most.
    try:
        folder = Path(tempfile.mkdtemp(prefix="flowjobs-mps-", dir="/tmp"))
    except OSError as error:
        raise ConfigError(f"MPS: no folder in /tmp: {error.strerror}") from error
    variables = {PIPE_FOLDER: str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    # The daemon numbers the GPUs that it sees anew, and a job whose runs share has one.
    of_client = variables | {"CUDA_VISIBLE_DEVICES": "0"}
    try:
        try:
            _control("-d", variables)
            _check_client(of_client, folder)
            yield of_client
        finally:
            with contextlib.suppress(ConfigError):
                _control(None, variables, f"quit -t {CLIENTS_END_WITHIN_S}\n")
    finally:
        _remove(folder)


def shares_faults(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this run computes by MPS beside others: a fault of one on the GPU is then told to
    all of them, and not whose it is."""
    return PIPE_FOLDER in environment and runs_that_share(environment) > 1


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


def _check_client(variables: dict[str, str], folder: Path) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", CLIENT],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMPUTES_WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"MPS: {error}; {_last_line(folder)}") from error
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise ConfigError(f"MPS: no process can compute by it: {said}; {_last_line(folder)}")


def _last_line(folder: Path) -> str:
    """What the daemon or its server has logged last."""
    lines: list[str] = []
    for name in ("control.log", "server.log"):
        with contextlib.suppress(OSError):
            lines += (folder / name).read_text(errors="replace").splitlines()
    return lines[-1].strip() if lines else "it has logged nothing"


def _remove(folder: Path) -> None:
    """Remove its folder, into which it may still write as it ends."""
    deadline = time.monotonic() + REMOVED_WITHIN_S
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
