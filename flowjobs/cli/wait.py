"""flowjobs wait."""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.runs_named import RunNames, check_named, never_made, readable_runs
from flowjobs.errors import ConfigError
from flowjobs.formatting import counts_of, first_of
from flowjobs.runs.run import Run, absolute
from flowjobs.runs.status import (
    EXIT_BAD_INPUT,
    EXIT_CANCELLED,
    EXIT_FAILED,
    EXIT_PREEMPTED,
)

if TYPE_CHECKING:
    from flowjobs.jobs.run_stages import Member

ASK_EVERY_S = 10.0
FIRST_ASK_S = 1.0
SAY_EVERY_S = 60.0
# How long nothing may be known of the runs that are left: a controller that restarts or is
# overloaded is silent for minutes, and whoever waits overnight is not there to ask again.
UNKNOWN_AT_MOST_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Wait(InStudy):
    """Wait until runs have ended.

    Exit codes: 0 all are finished; 1 one failed; 75 the time is over, or one was interrupted and
    nothing will resume it; 130 one was cancelled; 2 one is unknown or was never submitted.
    """

    names: RunNames
    """Names, patterns, a sweep, a group, or FIELD=VALUE (flow=otcfm state=failed)."""

    hours: float = 168.0
    """Give up after this many hours."""

    def run(self, defaults: Defaults) -> int:
        """Wait. Returns the exit code."""
        from flowjobs.jobs.run_stages import held_for, stages

        check_named("wait", self.names)
        if not self.hours > 0:
            raise ConfigError(f"--hours: found {self.hours}, expected more than 0")
        runs, broken = readable_runs(self.study, self.names)
        if missing := [*never_made(defaults, absolute(self.study), self.names)]:
            print(f"error: of the sweep, not in the study: {first_of(missing)}", file=sys.stderr)
        # Once: of one that is removed, or cannot be read, meanwhile, `stages` says so.
        configs = {run: run.config() for run in runs}
        found: dict[Run, Member] = {}
        began = known_at = time.monotonic()
        end = began + 3600 * self.hours
        said, said_at, pause_s = "", began - SAY_EVERY_S, FIRST_ASK_S
        while True:
            # What is finished is not looked at again.
            open_runs = [run for run in runs if run not in found or found[run].stage != "finished"]
            found |= stages({run: configs[run] for run in open_runs})
            counts = Counter(member.stage for member in found.values())
            words = counts_of(counts)
            words += "".join(f"; waits {why}" for why in held_for(found.values()))
            unknown = {member.why for member in found.values() if member.stage == "unknown"}
            words += f"; {shorten(min(unknown), 150, placeholder=' …')}" if unknown else ""
            if words != said or time.monotonic() - said_at > SAY_EVERY_S:
                said, said_at = words, time.monotonic()
                print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)
            alive = counts["waiting"] + counts["running"]
            if alive or not unknown:
                known_at = time.monotonic()
            if not alive and (not unknown or time.monotonic() - known_at > UNKNOWN_AT_MOST_S):
                code = _end([found[run] for run in runs])
                return code or (EXIT_BAD_INPUT if broken or missing else 0)
            if time.monotonic() > end:
                print(f"gave up after {self.hours:g} hours; the same command waits again")
                return EXIT_PREEMPTED
            time.sleep(max(0.0, min(pause_s, end - time.monotonic())))
            pause_s = min(ASK_EVERY_S, 1.5 * pause_s)


def _end(members: "list[Member]") -> int:
    """Print which runs have not finished. Returns the exit code."""
    codes = {
        "failed": EXIT_FAILED,
        "to resume": EXIT_PREEMPTED,
        "new": EXIT_BAD_INPUT,
        "unknown": EXIT_BAD_INPUT,
        "cancelled": EXIT_CANCELLED,
    }
    found = {stage: [member for member in members if member.stage == stage] for stage in codes}
    for stage, of_stage in found.items():
        if of_stage:
            causes = ", ".join(sorted({member.why for member in of_stage if member.why}))
            names = first_of([member.run.name for member in of_stage])
            print(f"{stage}: {names}{f' ({causes})' if causes else ''}")
    return next((codes[stage] for stage in codes if found[stage]), 0)
