"""A node: slurmd in namespaces of its own, every process that runs there, and Slurm's view."""

import contextlib
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.cluster.client import parse_fields, run_client
from tests.cluster.daemons import Daemon, find_program, send_signal
from tests.cluster.namespaces import as_host, processes_of_host
from tests.cluster.settings import hosts_file
from tests.cluster.waiting import ClusterError, wait_until

_DAEMONS = ("slurmd", "slurmstepd")


@dataclass(frozen=True)
class Node:
    """One node of the cluster under `root`."""

    name: str
    root: Path

    @property
    def slurmd(self) -> Daemon:
        """Its daemon."""
        slurmd = find_program("slurmd") or "slurmd"
        command = (slurmd, "-D", "-N", self.name, "-f", str(self._slurm_conf))
        host = as_host(self.name, hosts_file(self.root, self.name))
        return Daemon(f"slurmd-{self.name}", self.root, (*host, *command))

    # Its processes

    def processes(self) -> list[int]:
        """Everything that runs on the node: slurmd, slurmstepd, jobs and what jobs left behind."""
        return processes_of_host(hosts_file(self.root, self.name))

    def kill(self) -> None:
        """Everything on the node dies at once, as when its power fails."""
        # Stopped first, slurmd and slurmstepd cannot report the deaths of the others to Slurm.
        for pid in self.processes():
            if _program_of(pid) in _DAEMONS:
                send_signal(pid, signal.SIGSTOP)
        self._kill_all(self.processes, "all processes")

    def kill_jobs(self) -> None:
        """Everything on the node dies but Slurm's own programs, which see it and report it."""

        def jobs() -> list[int]:
            # srun lives on, too: slurmstepd takes seconds to see that the srun it reports to is
            # dead, and none to end if it is not.
            return [pid for pid in self.processes() if _program_of(pid) not in (*_DAEMONS, "srun")]

        self._kill_all(jobs, "the jobs' processes")

    def _kill_all(self, find: Callable[[], list[int]], what: str) -> None:
        def none_left() -> bool:
            pids = find()
            for pid in pids:
                send_signal(pid, signal.SIGKILL)
            return not pids

        # More than once, for what forks in between.
        wait_until(none_left, f"{what} of node {self.name} to die", 60)

    def start(self) -> None:
        """Starts slurmd, unless it runs, and does not wait for it."""
        if not self.processes():
            # After a power failure the node's own disk is empty, as it is where nodes boot over the
            # network: slurmd, cleaning up after jobs, would be in the way of their next starts.
            shutil.rmtree(self._spool, ignore_errors=True)
        self._spool.mkdir(parents=True, exist_ok=True)
        self.slurmd.start()

    # As Slurm sees it

    def bring_back(self) -> None:
        """Starts slurmd, unless it runs, and waits until the node takes jobs.

        Jobs that were lost with the node are requeued by then; those that run there still, do.
        """
        if self.slurmd.pid() is None:
            lost_power = not self.processes()
            # Slurm repeats for seconds what it could not tell the node: to end the jobs it had.
            # No job may start before that is told, lest a requeued one is ended in their place.
            self.set_state("drain")
            self.start()
            self.slurmd.wait_ready(lambda: self._is_registered(self._show()))
            if lost_power:
                # A machine takes longer to boot than Slurm to give it up. This one comes back at
                # once, and Slurm would believe for 15 s and more that its jobs had never stopped.
                self.set_state("down")
            # It tries each second. What it has for other nodes that are dead is not waited for.
            with contextlib.suppress(ClusterError):
                what = "slurmctld to deliver its messages"
                wait_until(self._was_told_all, what, 30, at_least_s=0)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until the node takes jobs and is rid of dead ones; resumes it if need be."""

        def takes_jobs() -> bool:
            fields = self._show()
            if not self._is_registered(fields):
                return False
            state, *flags = fields["State"].split("+")
            if state == "DOWN" or "DRAIN" in flags:
                self.set_state("resume")
                return False
            return state in ("IDLE", "MIXED", "ALLOCATED") and not flags

        self.slurmd.wait_ready(takes_jobs)

    def set_state(self, state: str) -> None:
        """`scontrol update` of the node's state: down, drain or resume."""
        change = (f"nodename={self.name}", f"state={state}", "reason=test")
        run_client(self._slurm_conf, ("scontrol", "update", *change))

    @property
    def _spool(self) -> Path:
        return self.root / "spool" / self.name

    @property
    def _slurm_conf(self) -> Path:
        return self.root / "etc" / "slurm.conf"

    def _show(self) -> dict[str, str]:
        command = ("scontrol", "show", "node", self.name, "--oneliner")
        return parse_fields(run_client(self._slurm_conf, command))

    def _is_registered(self, fields: dict[str, str]) -> bool:
        """Whether the controller has heard of the slurmd that runs now.

        Until then, it shows what it last knew of the node.
        """
        start_time = fields.get("SlurmdStartTime", "None")
        if start_time in ("None", "Unknown"):
            return False
        # Slurm tells times in whole seconds.
        started = int(self.slurmd.pid_file.stat().st_mtime)
        return datetime.fromisoformat(start_time).timestamp() >= started

    def _was_told_all(self) -> bool:
        return re.search(r"Agent count: +0\n", run_client(self._slurm_conf, ("sdiag",))) is not None


def _program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""
