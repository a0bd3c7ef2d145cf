"""The lines of `status` for many runs: one a sweep or group, and those that need action."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, get_args

from flowjobs.cli.output import NewLines
from flowjobs.formatting import duration_words

if TYPE_CHECKING:
    from flowjobs.jobs.run_stages import Group, Stage, Standing

BAR_WIDTH = 20
WATCH_EVERY_S = 10.0
# So many looks in a row at which nothing is known to live and something is unknown end a wait.
UNKNOWN_AT_MOST = 6
# More runs of one kind are counted, not listed.
LISTED = 5


def print_overview(groups: "Sequence[Group]") -> None:
    """Print the groups, and what needs action."""
    from flowjobs.cli.table import print_text

    print_groups(groups)
    trouble: dict[tuple[str, str], list[Standing]] = {}
    for group in groups:
        for standing in group.standings:
            if standing.needs_action:
                silent = standing.stage == "running"  # each says for how long, and where
                kind = "silent" if silent else standing.glance.kind or standing.why
                trouble.setdefault((standing.stage, kind), []).append(standing)
    for (stage, kind), some in sorted(trouble.items()):
        for standing in some[:LISTED]:
            how = "waits" if stage == "waiting" else f"{stage}:"
            print_text(f"{standing.glance.name} {how} {standing.why}")
        if len(some) > LISTED:
            print(f"and {len(some) - LISTED} more {stage}: {kind}")


def print_groups(groups: "Sequence[Group]") -> None:
    """Print a line a group: a bar, how many runs are at which stage, and the time that is left."""
    from flowjobs.cli.table import print_fitting
    from flowjobs.jobs.run_stages import Stage

    stages = [
        stage
        for stage in get_args(Stage)
        if stage in ("finished", "running", "waiting", "failed")
        or any(group.counts[stage] for group in groups)
    ]
    rows = []
    for group in groups:
        full = int(group.progress * BAR_WIDTH)
        left = duration_words(group.left_s)
        rows.append(
            {
                "group": group.name,
                "": "━" * full + "─" * (BAR_WIDTH - full),
                "of": str(group.total),
                **{stage: str(group.counts[stage] or "") for stage in stages},
                "not made": str(group.missing or ""),
                "left": f"about {left}" if left else "",
            }
        )
    # What no group has goes first where there is little room, and what can be told from the rest.
    none = [title for title in rows[0] if title and not any(row[title] for row in rows)]
    for row in rows:
        for title in {"not made", "left"} & {*none}:
            del row[title]
    first = ("", *none, "not made", "waiting", "left", "running", "cancelled", "new", "to resume")
    print_fitting(rows, first, right=("of", "not made", *stages))


def watch(show: "Callable[[], Collection[Stage]]", again: str) -> None:
    """Show again and again, until Ctrl-C, or nothing runs or waits any more as far as is known.

    Args:
        show: Prints, and says how the runs stand.
        again: The command that does.
    """
    from flowjobs.cli.table import plain_console

    drawn = sys.stdout.isatty() and not plain_console().is_dumb_terminal
    before: set[str] = set()
    unknown = 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if drawn:
                print("\x1b[H\x1b[J", end="")
                stages = show()
            else:
                shown, errors = io.StringIO(), NewLines(sys.stderr, before)
                with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
                    stages = show()
                lines = shown.getvalue().splitlines()
                for line in lines:
                    if line not in before:
                        print(line, flush=True)
                before = {*lines, *errors.lines}
            if "running" not in stages and "waiting" not in stages:
                # Slurm may just not answer: what is unknown now may run.
                unknown = unknown + 1 if "unknown" in stages else 0
                if unknown == UNKNOWN_AT_MOST:
                    print(
                        f"no longer watching: nothing runs or waits, but for {unknown} looks it "
                        f"has been unknown whether some of it does; {again} looks again",
                        file=sys.stderr,
                    )
                if unknown in (0, UNKNOWN_AT_MOST):
                    return
            time.sleep(WATCH_EVERY_S)
