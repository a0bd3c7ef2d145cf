"""Timing things against each other in one run, on machines that are shared and noisy."""

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.tracking.attempts import children, kill

# What is timed; where it returns seconds, as a float, these count.
Timed = Callable[[], object]


def paired_ratios(ours: Timed, others: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """How many times longer each of `others` takes than `ours`.

    Everything is run once to warm up; then in turns, so that a slow minute of the machine hits
    all alike. The ratio of a pair is taken within its round.

    Args:
        ours: What is measured.
        others: What a user would take instead, by name.
        rounds: How often each is timed.

    Returns:
        The median ratio by name.
    """
    everything = {"ours": ours, **others}
    times: dict[str, list[float]] = {name: [] for name in everything}
    for timed in everything.values():
        timed()
    for _ in range(rounds):
        for name, timed in everything.items():
            started = time.perf_counter()
            seconds = timed()
            whole = time.perf_counter() - started
            times[name].append(seconds if isinstance(seconds, float) else whole)
    ratios = {
        name: statistics.median(
            theirs / own for theirs, own in zip(times[name], times["ours"], strict=True)
        )
        for name in others
    }
    print()
    for name, seconds in times.items():
        spread = f"{min(seconds):.2f} to {max(seconds):.2f} s"
        print(f"{name:24} {spread:20} {ratios.get(name, 1.0):.2f}")
    return ratios


def ratios_in_turns(
    ours: Sequence[str], others: Mapping[str, Sequence[str]], rounds: int
) -> dict[str, float]:
    """How many times longer each of `others` runs than `ours`, in turns of a second.

    Args:
        ours: The command that is measured; as the others it stops itself where its time begins.
        others: What a user would take instead, by name.
        rounds: How often each is timed.

    Returns:
        The median ratio by name.
    """
    commands = {"ours": ours, **others}
    environment = {**os.environ, "PYTHONPATH": tests_on_path(), "IN_TURNS": str(len(commands))}
    times = [seconds_in_turns(commands, environment, from_a_stop=True) for _ in range(rounds)]
    print()
    ratios = {name: statistics.median(s[name] / s["ours"] for s in times) for name in times[0]}
    for name, ratio in ratios.items():
        seconds = [s[name] for s in times]
        print(f"{name:24} {min(seconds):.2f} to {max(seconds):.2f} s  {ratio:.3f}")
    return ratios


def tests_on_path() -> str:
    """PYTHONPATH, with what these tests are in before what is there."""
    there = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(Path(__file__).parents[2]), *([there] if there else [])])


def seconds_in_turns(
    commands: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    turn_s: float = 1.0,
    *,
    from_a_stop: bool = False,
) -> dict[str, float]:
    """How long each command runs to its end, in seconds, the others being stopped meanwhile.

    For commands of minutes: the machine gets slower and faster within them, and turns of a second
    let that hit all alike. What a command starts is stopped with it.

    Args:
        commands: By name.
        environment: Of all of them.
        turn_s: How long each runs at a time.
        from_a_stop: Count from where a command has stopped itself, by SIGSTOP; all get there first.
            Their main threads then have the same CPU: one may be a fifth slower than another, as
            the first, which takes the interrupts, and a process stays where it was.

    Raises:
        CalledProcessError: One failed.
    """
    running = {
        name: subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for name, command in commands.items()
    }
    seconds = dict.fromkeys(commands, 0.0)
    try:
        for process in running.values():
            if from_a_stop:
                _wait_for_stop(process)
            else:
                process.send_signal(signal.SIGSTOP)
        while running:
            for name, process in list(running.items()):
                if from_a_stop:
                    _use_last_cpu(process.pid)
                started = time.perf_counter()
                _signal_tree(process.pid, signal.SIGCONT)
                try:
                    if code := process.wait(turn_s):
                        raise subprocess.CalledProcessError(code, process.args)
                    del running[name]
                except subprocess.TimeoutExpired:
                    _signal_tree(process.pid, signal.SIGSTOP)
                seconds[name] += time.perf_counter() - started
            running = dict(reversed(running.items()))  # none is always the first
    finally:
        for process in running.values():
            _signal_tree(process.pid, signal.SIGCONT)  # the mirror goes when it sees the end
            process.kill()
            process.wait()
    return seconds


def _wait_for_stop(process: "subprocess.Popen[bytes]") -> None:
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        process.returncode = os.waitstatus_to_exitcode(status)
        raise subprocess.CalledProcessError(process.returncode, process.args)


def _use_last_cpu(pid: int) -> None:
    everywhere = os.sched_getaffinity(0)
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, {max(everywhere)} if thread == pid else everywhere)


def _signal_tree(pid: int, number: signal.Signals) -> None:
    """Signal a process first, so that when it is stopped it starts no more of them, then those."""
    kill(pid, with_signal=number)
    for child in children(pid):
        _signal_tree(child, number)
