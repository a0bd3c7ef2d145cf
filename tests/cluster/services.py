"""The daemons of the cluster: what each is started with, and how to tell that it serves."""

import socket
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from tests.cluster.client import run_client
from tests.cluster.daemons import Daemon, find_program
from tests.cluster.namespaces import as_host
from tests.cluster.nodes import Node
from tests.cluster.ports import Ports, is_listening
from tests.cluster.settings import CONTROLLER, NODE_NAMES, hosts_file
from tests.cluster.waiting import ClusterError, wait_until


class Services:
    """The daemons under one root, in the order in which they need each other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.slurm_conf = root / "etc" / "slurm.conf"
        self._munge_socket = root / "munge" / "socket"
        self._database_socket = root / "mariadb" / "socket"
        self._database_options = f"--defaults-file={root / 'etc' / 'mariadb.cnf'}"

        munge = (
            *("--foreground", "--force", f"--socket={self._munge_socket}"),
            *(f"--key-file={root / 'munge' / 'key'}", f"--seed-file={root / 'munge' / 'seed'}"),
            f"--pid-file={root / 'run' / 'munged.munge.pid'}",
        )
        controller = as_host(CONTROLLER, hosts_file(root, CONTROLLER))
        slurmctld = (_program("slurmctld"), "-D", "-f", str(self.slurm_conf))
        self.munged = Daemon("munged", root, (_program("munged"), *munge))
        self.mariadbd = Daemon("mariadbd", root, (_program("mariadbd"), self._database_options))
        self.slurmdbd = Daemon(
            "slurmdbd",
            root,
            (*controller, _program("slurmdbd"), "-D"),
            # It has no option for its settings: they are looked for beside slurm.conf.
            {"SLURM_CONF": str(self.slurm_conf), "MYSQL_UNIX_PORT": str(self._database_socket)},
        )
        self.slurmctld = Daemon("slurmctld", root, (*controller, *slurmctld))
        self.nodes = {name: Node(name, root) for name in NODE_NAMES}

    def daemons(self) -> list[Daemon]:
        """All of them, in the order in which they start."""
        return self._central() + [node.slurmd for node in self.nodes.values()]

    def pids(self) -> dict[str, int | None]:
        """The process id of each daemon, None where it does not run."""
        return {daemon.name: daemon.pid() for daemon in self.daemons()}

    def is_any_running(self) -> bool:
        """Whether at least one daemon runs."""
        return any(self.pids().values())

    def start_accounting(self) -> None:
        """Starts what the controller needs, unless it runs: munge, the database and slurmdbd."""
        ports = Ports.load(self.root)
        self.munged.start()
        if not (self.root / "mariadb" / "data").exists():
            self._create_database()
        self.mariadbd.start()
        self.munged.wait_ready(partial(_accepts, self._munge_socket))
        self.mariadbd.wait_ready(partial(_accepts, self._database_socket))
        self.slurmdbd.start()
        self.slurmdbd.wait_ready(partial(is_listening, ports.slurmdbd))

    def start_controller(self) -> None:
        """Starts slurmctld, unless it runs, and waits until it answers."""
        ports = Ports.load(self.root)

        def answers() -> bool:
            # A client command would go on trying for seconds where nobody listens yet.
            if not is_listening(ports.slurmctld):
                return False
            return bool(run_client(self.slurm_conf, ("scontrol", "show", "config")))

        self.slurmctld.start()
        self.slurmctld.wait_ready(answers)

    def end_jobs(self, timeout_s: float = 60) -> None:
        """Kills the processes of every job, cancels it and waits until the queue is empty."""

        def queue_is_empty() -> bool:
            if not run_client(self.slurm_conf, ("squeue", "--noheader")).strip():
                return True
            # Killed first: Slurm takes 3 s and more to end a job whose processes live. Again and
            # again: what ends may start another, or put itself back into the queue.
            for node in self.nodes.values():
                node.kill_jobs()
            run_client(self.slurm_conf, ("scancel", "--user=root"))
            return False

        def queue() -> str:
            return run_client(self.slurm_conf, ("squeue",))

        wait_until(queue_is_empty, "the queue to be empty", timeout_s, queue)

    def stop(self) -> bool:
        """Kills what runs on the nodes and stops the rest. False if some had to be forced."""
        for node in self.nodes.values():
            node.kill()
        return all([daemon.stop() for daemon in reversed(self._central())])

    def kill(self) -> None:
        """Kills all, for when no state is to be saved."""
        for node in self.nodes.values():
            node.kill()
        for daemon in reversed(self._central()):
            daemon.kill()

    def _central(self) -> list[Daemon]:
        return [self.munged, self.mariadbd, self.slurmdbd, self.slurmctld]

    def _create_database(self) -> None:
        # Made aside and renamed, so that a half-made one is never taken for whole; under a name of
        # its own, because the command goes on when a boot is killed.
        data = self.root / "mariadb" / "data"
        new = Path(tempfile.mkdtemp(prefix="data.", dir=data.parent))
        command = [_program("mariadb-install-db"), self._database_options, f"--datadir={new}"]
        command += ["--auth-root-authentication-method=normal"]  # no password; see settings.py
        command += ["--skip-test-db", "--skip-name-resolve"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"mariadb-install-db failed:\n{done.stdout}{done.stderr}")
        new.rename(data)


def _program(name: str) -> str:
    return find_program(name) or name


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True
