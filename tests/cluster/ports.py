"""The ports of the cluster's daemons."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.waiting import ClusterError

_NODES = 4
_SIZE = 2 + _NODES

# Below the range that the kernel hands out, so that no client's port is in the way. A second
# cluster (another --root) takes the next block.
_BLOCKS = range(16810, 16910, 10)


@dataclass(frozen=True)
class Ports:
    """A block of ports that begins with `slurmctld`."""

    slurmctld: int

    @classmethod
    def load(cls, root: Path) -> "Ports":
        """Those of the cluster in this folder."""
        return cls(int((root / "ports").read_text()))

    def save(self, root: Path) -> None:
        """Makes them those of the cluster in this folder."""
        (root / "ports").write_text(str(self.slurmctld))

    @property
    def slurmdbd(self) -> int:
        return self.slurmctld + 1

    @property
    def nodes(self) -> str:
        """The nodes' ports as slurm.conf writes a range."""
        first = self.slurmctld + 2
        return f"[{first}-{first + _NODES - 1}]"


def free_ports() -> Ports:
    """A block of which all ports are free.

    Raises:
        ClusterError: there is none; the text says which ports are in use.
    """
    taken: list[int] = []
    for first in _BLOCKS:
        in_use = [port for port in range(first, first + _SIZE) if not _is_free(port)]
        if not in_use:
            return Ports(first)
        taken += in_use
    raise ClusterError(
        f"no block of ports is free for the cluster: {', '.join(map(str, taken))} are in use; "
        "other clusters are stopped with `python -m tests.cluster down --root DIR`"
    )


@contextmanager
def boots_take_turns() -> Iterator[None]:
    """Two clusters that boot at once would find the same ports free: one waits for the other."""
    lock = Path(tempfile.gettempdir()) / f"flowjobs-slurm-ports-{os.getuid()}.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_listening(port: int) -> bool:
    """Whether some process listens on this loopback port; does not disturb it by connecting."""
    listening = f" 0100007F:{port:04X} 00000000:0000 0A "  # 0A is the state LISTEN
    return listening in Path("/proc/net/tcp").read_text()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the daemons do: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
