"""What this machine must have to boot the cluster, and how to get it."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.daemons import find_program
from tests.cluster.waiting import ClusterError

# Package by the program that is looked for.
_PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "mariadbd": "mariadb-server",
}
# Opens the page of a report in a test; no part of the cluster.
_BROWSER = {"chromium": "chromium"}
_INSTALL = "python -m tests.cluster install"


def missing_requirement() -> str | None:
    """What keeps the cluster from booting here, in one line with the remedy, or None."""
    if os.geteuid() != 0:
        return "the Slurm cluster needs root, for its nodes' namespaces and GPU devices: use sudo"
    if missing := _missing_packages():
        return f"the Slurm cluster needs {' '.join(missing)}: run `{_INSTALL}`"
    if error := _denied():
        return f"the Slurm cluster may not {error} here: run the container with --privileged"
    return None


def missing_browser() -> str | None:
    """What keeps a page from being opened here, in one line with the remedy, or None."""
    missing = _missing_packages(_BROWSER)
    return f"this needs {' '.join(missing)}: run `{_INSTALL}`" if missing else None


def install() -> int:
    """Installs the packages that are missing with apt-get; returns the exit code."""
    missing = _missing_packages(_PACKAGES | _BROWSER)
    if not missing:
        print("Everything is installed.")
        return 0
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print(
            f"error: installing needs root and apt-get (Debian or Ubuntu): {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "--yes", "--no-install-recommends", *missing],
    ):
        if code := subprocess.run(command, env=environment, check=False).returncode:
            raise ClusterError(f"{' '.join(command)} exited with {code}")
    return 0


def _missing_packages(packages: Mapping[str, str] = _PACKAGES) -> list[str]:
    return [package for program, package in packages.items() if find_program(program) is None]


def _denied() -> str | None:
    """What a container without privileges is not allowed to do."""
    command = ["unshare", "--mount", "--uts", "sh", "-c"]
    command.append("hostname n1 && mount --bind /etc/hosts /etc/hosts")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return "unshare namespaces"
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.mknod(Path(folder) / "gpu0", stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            return "make device files"
    return None
