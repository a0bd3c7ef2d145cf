"""The control groups of Linux that this process is in, which limit its memory and processors."""

from collections.abc import Iterator
from pathlib import Path


def control_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The folder of each group that the process is in, the innermost first, and its version (1, 2).

    A limit of a group above holds too.

    Args:
        root: Where /proc and /sys are.
        controller: What is limited: "memory", "cpu".
    """
    groups = root / "proc/self/cgroup"
    if not groups.exists():  # not Linux
        return
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, version = "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            mount, version = f"sys/fs/cgroup/{controller}", 1
        else:
            continue
        # In a container the path may be the host's and not be there: its own group is then the one
        # at the mount.
        group = Path(path.lstrip("/"))
        for part in (group, *group.parents):
            yield root / mount / part, version


def memory_kills(root: Path = Path("/")) -> int:
    """How many processes of this one's group the kernel has killed for its memory; 0 if unknown."""
    for folder, version in control_groups(root, "memory"):
        file = folder / ("memory.events" if version == 2 else "memory.oom_control")
        if file.exists():
            counts = dict(line.split() for line in file.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0
