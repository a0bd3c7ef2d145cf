"""What a command of flowjobs uses: time, memory, and files of runs that it opens."""

import resource
import subprocess
import sys
from dataclasses import dataclass

WATCHED = """
import sys
from pathlib import Path

opened = [0]

def hook(event, arguments):
    if event == "open" and "study/runs/" in str(arguments[0]):
        opened[0] += 1

sys.addaudithook(hook)
from flowjobs.cli import main
try:
    main(sys.argv[1:])
finally:
    # Not ru_maxrss: over exec it keeps the peak of the process that started this one.
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    peak_kib = next(words[1] for words in lines if words[0] == "VmHWM:")
    print(*opened, peak_kib, file=sys.stderr)
"""


@dataclass(frozen=True)
class Usage:
    """Of one process of its own.

    Attributes:
        stdout: What it printed.
        cpu_s: User and system time, in seconds.
        peak_mb: Most memory resident.
        opened: Files in the folders of runs.
    """

    stdout: str
    cpu_s: float
    peak_mb: float
    opened: int


def usage_of(*command: str) -> Usage:
    """Run a command of flowjobs that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *command], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    opened, peak_kib = map(int, done.stderr.split()[-2:])
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(done.stdout, cpu_s, peak_kib / 1024, opened)
