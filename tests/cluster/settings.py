"""What is written under the cluster's folder before its daemons start: settings, keys, devices."""

import hashlib
import os
import secrets
import socket
import stat
import subprocess
from pathlib import Path
from string import Template

from tests.cluster.daemons import find_program
from tests.cluster.ports import Ports
from tests.cluster.waiting import ClusterError

CONTROLLER = "controller"
NODE_NAMES = ("n1", "n2", "n3", "n4")
GPUS_PER_NODE = 4

_TEMPLATES = Path(__file__).parent / "conf"
_TEMPLATE_NAMES = ("slurm.conf", "gres.conf", "slurmdbd.conf", "mariadb.cnf")

# Slurm puts sockets into its spool folder, and the path of a socket ends at 107 characters.
_LONGEST_ROOT = 70


def fingerprint() -> str:
    """Changes with whatever makes the state of an earlier boot unusable."""
    slurmctld = find_program("slurmctld") or "slurmctld"
    version = subprocess.run([slurmctld, "-V"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + socket.gethostname().encode())
    for name in _TEMPLATE_NAMES:
        digest.update((_TEMPLATES / name).read_bytes())
    return digest.hexdigest()


def hosts_file(root: Path, host: str) -> Path:
    """What the processes of a node, or of the controller, see as /etc/hosts."""
    return root / "hosts" / host


def create_folders(root: Path) -> None:
    """Makes the cluster's folders, keys and devices; what is there stays."""
    if len(str(root)) > _LONGEST_ROOT:
        raise ClusterError(
            f"{root} has {len(str(root))} characters, and the paths of Slurm's sockets under it "
            f"would be too long: choose a --root of at most {_LONGEST_ROOT}"
        )
    # munged wants its socket's folders to be open to all; anyone who reaches the database's
    # socket is its root, so that folder stays closed.
    modes = dict.fromkeys((".", "etc", "log", "run", "munge", "slurmctld", "dev", "hosts"), 0o755)
    for name, mode in (modes | {"mariadb": 0o700}).items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(mode)
    key = root / "munge" / "key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
    for name in (CONTROLLER, *NODE_NAMES):
        _write_hosts(hosts_file(root, name))
    for index in range(GPUS_PER_NODE):
        device = root / "dev" / f"gpu{index}"
        if not device.exists():
            os.mknod(device, stat.S_IFCHR, os.makedev(1, 3))
            device.chmod(0o666)


def write_settings(root: Path, ports: Ports, user_signal: bool) -> None:
    """Writes the daemons' settings, each file replaced whole.

    Args:
        root: the cluster's folder.
        ports: what the daemons listen on.
        user_signal: whether preempted jobs get the signal they asked for with --signal.
    """
    values = {
        "root": root,
        "slurmctld_port": ports.slurmctld,
        "slurmdbd_port": ports.slurmdbd,
        "node_ports": ports.nodes,
        "unless_user_signal": "" if user_signal else "#",
    }
    for name in _TEMPLATE_NAMES:
        text = Template((_TEMPLATES / name).read_text()).substitute(values)
        new = root / "etc" / f"{name}.new"
        new.write_text(text)
        # slurmdbd refuses settings that others may read.
        new.chmod(0o600 if name == "slurmdbd.conf" else 0o644)
        new.replace(root / "etc" / name)


def _write_hosts(path: Path) -> None:
    # Never written again: it is by this very file that the host's processes are recognized.
    if not path.exists():
        names = " ".join(("localhost", socket.gethostname(), CONTROLLER, *NODE_NAMES))
        path.write_text(f"127.0.0.1 {names}\n")
