"""Booting and stopping the cluster, whatever state an earlier boot left it in."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import settings
from tests.cluster.client import run_client
from tests.cluster.ports import boots_take_turns, free_ports
from tests.cluster.services import Services
from tests.cluster.waiting import ClusterError, wait_until

logger = logging.getLogger(__name__)


class Boot:
    """Brings the daemons of one root up and down.

    A boot is taken up where it stands only if that is known to be good: all is up but for what
    died since, or all was stopped in order. Anything else is wiped, which costs a second or two.
    So is a cluster whose slurmctld died: it has forgotten its last seconds, and would give the ids
    of its last jobs to others, which accounting then mixes up.
    """

    def __init__(self, services: Services) -> None:
        self.root = services.root
        self._services = services
        self._condition_file = self.root / "condition"
        self._fingerprint_file = self.root / "fingerprint"

    def up(self) -> bool:
        """Boots the cluster, or starts what is missing of it. False if it was up."""
        with self.lock("boot"), boots_take_turns():
            if self.is_up() and self._is_of_this_version():
                return False
            if self._is_worth_keeping():
                try:
                    self._start()
                    return True
                except ClusterError as error:  # the state is not as good as it looked
                    logger.warning("The cluster is booted from nothing, because %s", error)
            self._wipe()
            try:
                self._start()
            except ClusterError:
                self._services.kill()
                raise
        return True

    def down(self) -> None:
        """Ends every job and daemon."""
        with self.lock("boot"):
            # slurmctld saves its state when it ends; if it had ended before, how is not known.
            saved = self._services.slurmctld.pid() is not None and self._condition() == "up"
            if self._services.is_any_running():
                self._condition_file.unlink(missing_ok=True)
            if self._services.stop() and saved:
                self._condition_file.write_text("stopped")

    def is_up(self) -> bool:
        """Whether every daemon runs, the controller answers and each node takes jobs."""
        if not all(self._services.pids().values()):
            return False
        unusable = ("--noheader", "--states=down,drain,no_respond,unknown", "--format=%N")
        try:
            return not run_client(self._services.slurm_conf, ("sinfo", *unusable)).strip()
        except ClusterError:
            return False

    def start_nodes_without_jobs(self) -> None:
        """Starts slurmd where it is missing, ends all jobs and waits until the nodes are idle."""
        for node in self._services.nodes.values():
            node.start()
        # Only now: without slurmd Slurm waits in vain to hear that a job's processes ended.
        self._services.end_jobs()
        for node in self._services.nodes.values():
            node.wait_ready()

    @contextlib.contextmanager
    def lock(self, what: str, wait: bool = True) -> Iterator[None]:
        """A lock beside the folder, because a boot may empty the folder.

        Raises:
            BlockingIOError: another process has it, and `wait` is false.
        """
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with self.root.with_name(f"{self.root.name}.{what}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    def _start(self) -> None:
        repairs = self._services.is_any_running()
        self._condition_file.unlink(missing_ok=True)
        settings.create_folders(self.root)
        if not repairs:
            ports = free_ports()
            ports.save(self.root)
            settings.write_settings(self.root, ports, user_signal=True)
        self._services.start_accounting()
        self._services.start_controller()
        if repairs:
            for node in self._services.nodes.values():
                node.bring_back()
        else:
            # Jobs of an earlier boot must not run again: before a node could start one.
            run_client(self._services.slurm_conf, ("scancel", "--user=root"))
            self.start_nodes_without_jobs()
        self._condition_file.write_text("up")

    def _condition(self) -> str:
        """How the last boot or stop ended: up, stopped, or empty if it was cut short."""
        return self._condition_file.read_text() if self._condition_file.exists() else ""

    def _is_worth_keeping(self) -> bool:
        is_any_running = self._services.is_any_running()
        if self._condition() != ("up" if is_any_running else "stopped"):
            return False
        if is_any_running and self._services.slurmctld.pid() is None:
            return False
        return self._is_of_this_version()

    def _is_of_this_version(self) -> bool:
        return self._fingerprint_file.read_text() == settings.fingerprint()

    def _wipe(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        content = [path for path in self.root.iterdir() if path != self._fingerprint_file]
        is_foreign = content and not self._fingerprint_file.exists()
        if is_foreign or self.root.stat().st_uid != os.geteuid():
            raise ClusterError(f"{self.root} is not a folder of this test cluster: choose another")
        self._services.kill()
        # All but the fingerprint: without it, a wipe that is cut short would not be taken up again.
        for path in content:
            _remove(path)
        self._fingerprint_file.write_text(settings.fingerprint())


def _remove(path: Path) -> None:
    def gone() -> bool:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        return not path.exists()

    # More than once: what a killed boot had started may go on to write for a moment.
    wait_until(gone, f"{path} to be removed", 60)
