"""How much memory this process may still take."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from flowjobs.cgroups import control_groups
from flowjobs.slots import runs_that_share

KIB = 1024


def free_memory_bytes(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """What this process may still take: of the machine's memory and of its job's, the lesser.

    Runs that share a job have equal parts.

    Args:
        root: Where /proc and /sys are.
        environment: For SLURM_MEM_PER_NODE (MB), the job's limit where no cgroup has it.
    """
    if not (root / "proc/meminfo").exists():  # not Linux, which has no job's limits either
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Runs that share the job may start at once, and each would take what is free for all.
    share = runs_that_share(environment)
    available = _fields(root / "proc/meminfo")["MemAvailable:"] * KIB
    free = [known // share for known in (available, *_free_in_cgroups(root))]
    limit_mb = environment.get("SLURM_MEM_PER_NODE", "")
    if limit_mb.isdigit() and int(limit_mb):  # 0 is all of the node's
        held = _fields(root / "proc/self/status")["VmRSS:"] * KIB
        free.append(int(limit_mb) * KIB**2 // share - held)
    return max(0, min(free))


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """What is left in each control group that the process is in."""
    for folder, version in control_groups(root, "memory"):
        if version == 2:
            names, cache = ("memory.max", "memory.current"), ""
        else:
            names, cache = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        limit, used = folder / names[0], folder / names[1]
        if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
            # The kernel takes back cached files before it runs out.
            stat = _fields(folder / "memory.stat")
            files = sum(stat[f"{cache}{state}_file"] for state in ("active", "inactive"))
            yield int(most) - int(used.read_text()) + files


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of lines "name number"."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
