"""A host name and a hosts file of its own for a process and all its children."""

import contextlib
import os
from pathlib import Path

from tests.cluster.daemons import all_pids

_BECOME_HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def as_host(name: str, hosts_file: Path) -> tuple[str, ...]:
    """What to put before a command so that it runs as this host."""
    unshare = ("unshare", "--mount", "--uts")
    return (*unshare, "sh", "-c", _BECOME_HOST, "sh", name, str(hosts_file))


def processes_of_host(hosts_file: Path) -> list[int]:
    """Every process that runs as the host with this hosts file.

    A process belongs to the host whose file it sees as /etc/hosts. Children inherit that whatever
    they do (detach, start a session, outlive the daemon), and no record of it can go stale.
    """
    try:
        hosts = hosts_file.stat()
    except FileNotFoundError:
        return []
    pids = []
    for pid in all_pids():
        with contextlib.suppress(OSError):
            if os.path.samestat(hosts, os.stat(f"/proc/{pid}/root/etc/hosts")):
                pids.append(pid)
    return pids
