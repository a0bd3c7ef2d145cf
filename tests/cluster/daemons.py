"""A daemon as a process: started detached, known by its pid file, stopped. Knows no Slurm."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.cluster.waiting import ClusterError, wait_until

# Root's PATH in a container or under `su` may lack the folders of the daemons.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

# In the environment of each daemon, with its root and name: a pid file is believed only if its
# process carries this, so that one left by a crash never points at a stranger's process.
_MARK = "FLOWJOBS_TEST_DAEMON"

# The process that becomes the daemon writes the pid file itself: killing whoever boots the
# cluster at any instant cannot leave a daemon that nobody knows of.
_WRITE_PID_AND_EXEC = 'umask 022; echo $$ > "$1.new" && mv "$1.new" "$1" && shift && exec "$@"'


def find_program(name: str) -> str | None:
    """The path of a program, also where PATH lacks the folders of the daemons."""
    return shutil.which(name, path=SEARCH_PATH)


def all_pids() -> Iterator[int]:
    """Every process of this machine."""
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def send_signal(pid: int, signum: signal.Signals) -> None:
    """Signals a process; one that has just ended is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _is_ending(pid: int) -> bool:
    """Whether a process was killed, but its ports and file locks may not be free yet."""
    first = _thread_state(pid, pid)
    if first not in ("ending", "dead"):
        return False
    # The first thread may be a zombie while others still hold what they share.
    threads = [int(path.name) for path in Path(f"/proc/{pid}/task").glob("*")]
    return any(_thread_state(pid, thread) in ("alive", "ending") for thread in threads)


def _thread_state(pid: int, thread: int) -> Literal["alive", "ending", "dead", "gone"]:
    try:
        text = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
    except OSError:
        return "gone"
    state, *fields = text.rpartition(")")[2].split()
    if state in ("Z", "X"):
        return "dead"
    return "ending" if int(fields[5]) & 0x4 else "alive"  # PF_EXITING, among its flags


@dataclass(frozen=True)
class Daemon:
    """One daemon of the cluster under `root`.

    Args:
        name: names its pid file and log.
        root: the cluster's folder.
        command: runs in the foreground; may go through wrappers that exec.
        environment: variables it needs beside PATH.
    """

    name: str
    root: Path
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def pid_file(self) -> Path:
        return self.root / "run" / f"{self.name}.pid"

    @property
    def log_file(self) -> Path:
        return self.root / "log" / f"{self.name}.log"

    @property
    def _mark(self) -> str:
        return f"{self.root}:{self.name}"

    def pid(self) -> int | None:
        """Its process id, or None if it does not run."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None
        return pid if self._is_process(pid) or _is_ending(pid) else None

    def start(self) -> None:
        """Starts it in a session of its own, unless it runs."""
        if self.pid() is not None:
            return
        self.pid_file.unlink(missing_ok=True)
        command = ["setsid", "--fork", "sh", "-c", _WRITE_PID_AND_EXEC, "sh", str(self.pid_file)]
        environment = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8", _MARK: self._mark}
        with self.log_file.open("ab") as log:
            subprocess.run(
                [*command, *self.command],
                env=environment | self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
            )
        wait_until(self.pid_file.exists, f"{self.name} to start", 60, self.log_tail)

    def wait_ready(self, is_ready: Callable[[], bool], timeout_s: float = 180) -> None:
        """Waits until it serves.

        Args:
            is_ready: asked again and again; a ClusterError that it raises counts as no.
            timeout_s: how long it may take; generous, for a machine that is busy otherwise.

        Raises:
            ClusterError: it ended, or does not serve in time; the text has the end of its log.
        """
        last_error = ""

        def ready_or_dead() -> bool:
            nonlocal last_error
            if self.pid() is None:
                raise ClusterError(f"{self.name} ended while it started\n{self.log_tail()}")
            try:
                return is_ready()
            except ClusterError as error:
                last_error = f"{error}\n"
                return False

        def explain() -> str:
            return last_error + self.log_tail()

        wait_until(ready_or_dead, f"{self.name} to be ready", timeout_s, explain)

    def stop(self, timeout_s: float = 90) -> bool:
        """Ends it, by force if it takes too long. False if force was needed."""
        pid = self.pid()
        if pid is None:
            return True
        send_signal(pid, signal.SIGTERM)
        try:
            gone = f"{self.name} to end"
            wait_until(lambda: self.pid() is None, gone, timeout_s, at_least_s=0)
        except ClusterError:
            self.kill()
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, and waits until the process is gone."""
        pid = self.pid()
        if pid is not None:
            send_signal(pid, signal.SIGKILL)
            wait_until(lambda: self.pid() is None, f"{self.name} to die", 60)

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log, for an error text."""
        try:
            text = self.log_file.read_text(errors="replace")
        except FileNotFoundError:
            text = ""
        tail = "\n".join(text.splitlines()[-lines:])
        return f"The end of {self.log_file}:\n{tail or '(empty)'}"

    def _is_process(self, pid: int) -> bool:
        # While a process becomes another program (exec), its environment reads as empty.
        for _ in range(50):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                return False
            if environment or _thread_state(pid, pid) != "alive":
                break
            time.sleep(0.01)
        return f"{_MARK}={self._mark}".encode() in environment.split(b"\0")
