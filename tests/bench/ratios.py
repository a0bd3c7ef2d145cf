"""Timing things against each other in one run, on machines that are shared and noisy."""

import statistics
import time
from collections.abc import Callable, Mapping

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
            timed()
            times[name].append(time.perf_counter() - started)
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
