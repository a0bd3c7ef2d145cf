"""Standard output, whatever comes in between."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from flowjobs.cli.output import Output

N = 300

# Another process: one of this would wait until this one lets it compute.
READER = """
import os, signal, sys
for line in sys.stdin:
    print(line, end="", flush=True)
    os.kill(os.getppid(), signal.SIGUSR1)
"""


class Interrupted(Exception):
    pass


def test_a_line_that_a_signal_comes_after_is_written_once() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before, cores = signal.signal(signal.SIGUSR1, interrupt), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # the reader is served first, and its signal comes early
    command = [sys.executable, "-c", READER]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            assert reader.stdin is not None
            output = Output(reader.stdin.fileno(), "utf-8")
            for number in range(N):
                with contextlib.suppress(Interrupted):
                    output.write(f"{number}\n")
                    while True:
                        time.sleep(0.05)  # until the line has been read
            output.flush()
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # of lines that came twice
            found, _ = reader.communicate()
    finally:
        os.sched_setaffinity(0, cores)
        signal.signal(signal.SIGUSR1, before)
    assert found.decode().split() == [str(number) for number in range(N)]
