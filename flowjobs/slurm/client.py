"""Running Slurm's commands: within a time limit, and whatever bytes they print."""

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping

from flowjobs.working_folder import working_folder

logger = logging.getLogger(__name__)

# What Slurm tells every process of a step.
STEP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

# Clients wait MessageTimeout (10 s by default) for a controller that is away.
CLIENT_TIMEOUT_S = 30
SAY_AFTER_S = 5.0

# Written into the comment of every job that we submit, and told by all of Slurm's commands; an
# array has it in the names of its logs too, which no site drops.
MARK = re.compile(r"flowjobs[:-]([0-9a-f]{12})")

# Names and comments hold anything but this.
SEPARATOR = "\x1f"

# What they say as they fail: a site's pipe around a command may lose its exit code.
_FAILED = re.compile(
    r"slurm_\w+ error|Unable to contact slurm|Kill job error|Batch job submission failed"
    rf"|Invalid user: {os.getuid()}\b"
)

# What they say where there is no cluster to ask: no configuration, and the DNS knows that there is
# no server of one. If it does not answer, or its server does not, there may be a cluster.
_NO_CLUSTER = re.compile(
    r"res_nsearch error: (Unknown host|No address associated with name)|no SRV records located"
)


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("scontrol") is not None


def controller_answers() -> tuple[bool | None, str]:
    """Whether jobs can be submitted to Slurm from here, and why not; None: not now, for there is
    a cluster, but its controller is away."""
    if shutil.which("sbatch") is None:
        return False, "sbatch is not on PATH"
    answer = run_command("scontrol", "ping")
    if answer.returncode == 0 and "is UP" in answer.stdout:
        return True, "sbatch is there and the controller answers"
    # Whatever else it says, there may be a cluster; also where its settings are not to be read now.
    none = _NO_CLUSTER.search(answer.stdout + answer.stderr) and not os.environ.get("SLURM_CONF")
    if none:
        return False, "sbatch is there, but Slurm is not configured: no slurm.conf"
    return None, f"sbatch is there, but no controller answers: {first_line(answer)}"


def cells_of(printed: str, count: int) -> list[list[str]]:
    """The fields of each line that has so many: not of a banner, nor of what follows a newline
    in the last field."""
    lines = (line.split(SEPARATOR, count - 1) for line in printed.splitlines())
    return [[cell.strip() for cell in cells] for cells in lines if len(cells) == count]


def timestamp(text: str | None) -> float | None:
    """A time that Slurm prints, in seconds of the epoch; None for "N/A", "Unknown" and the like."""
    try:
        # Slurm prints local time.
        return time.mktime(time.strptime(text or "", "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def run_command(
    *command: str,
    environment: Mapping[str, str] = os.environ,
    timeout_s: float = CLIENT_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Failing to start it, or its silence, is a failure of its own."""
    # Slurm signals every process of a step, and this one may be started as the job is told to
    # end. A blocked signal is inherited as blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STEP_SIGNALS)
    # A user's own formats and filters would change the answers, and which jobs are cancelled.
    own = ("SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_", "SCANCEL_")
    kept = {name: value for name, value in environment.items() if not name.startswith(own)}
    # Without the limit on bit strings Slurm cuts long lists of array tasks short.
    kept |= {"SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "standard"}
    try:
        # Ctrl-C is held back as long as it is unknown whether a job was taken.
        ctrl_c = " (Ctrl-C counts after that)" if command[0] == "sbatch" else ""
        with said_if_slow(f"{command[0]} has not answered yet", timeout_s, ctrl_c):
            # Whatever bytes a job's name or a site's banner holds.
            answer = subprocess.run(
                command,
                # A site's question is not answered by what the caller has for itself to read.
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                check=False,
                timeout=timeout_s,
                env=kept,
                # Where it is gone sbatch ends at once, also if it is given another (--chdir).
                cwd=None if working_folder() else "/",
            )
        answer.returncode = answer.returncode or int(bool(_FAILED.search(answer.stderr)))
        return answer
    except subprocess.TimeoutExpired:
        said = f"{command[0]} did not answer within {timeout_s:g} s"
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr=said)
    except OSError as error:
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr=str(error))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def said_if_slow(what: str, timeout_s: float, more: str = "") -> Iterator[None]:
    """Log what is waited for, if the block takes more than some seconds.

    Args:
        what: As a sentence.
        timeout_s: How long the block may take.
        more: Said after that.
    """
    text = f"{what}; waiting up to {timeout_s:.0f} s{more}"
    timer = threading.Timer(SAY_AFTER_S, logger.warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def first_line(answer: subprocess.CompletedProcess[str]) -> str:
    """The line of a command's output that says why it failed."""
    lines = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
    errors = [line for line in lines if "error" in line.lower()]  # others may be a banner's
    return (errors or lines or [f"exit code {answer.returncode}"])[0]
