"""What came of a drill: from the runs' folders and what was seen of them to a table's rows."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flowjobs.drill.facts import ClusterFacts, Shortfall, shortfalls
from flowjobs.drill.interruptions import Interruption
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, RunStatus


@dataclass(kw_only=True)
class Drilled:
    """A run of the drill, and what was seen of it.

    Attributes:
        run: The run.
        how: How it was interrupted; None for the one that was left in peace.
        interrupted: The number of the attempt that was interrupted; 0 if none was.
        saved_s: From the interruption until its end was noted, as seen from here; None if that was
            not seen.
        reached: The last step that was seen before the run went on.
        by_drill: Whether the drill itself had to submit it again.
        problem: What went wrong, in words.
    """

    run: Run
    how: Interruption | None
    interrupted: int = 0
    saved_s: float | None = None
    reached: int = 0
    by_drill: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Row:
    """What came of one interruption.

    Attributes:
        way: The interruption.
        signal: What the process says has reached it; None if it could not say.
        resumed_as: How the run resumed, in words; None if it did not.
        steps_lost: Steps that had to be done again.
        saved_s: Seconds from the interruption to a state that is saved, at most.
        same_bits: Whether it ended with the bits of the undisturbed run; None if it did not end.
        hosts: Where the attempts ran.
        problem: Why this is not as promised; empty if it is.
    """

    way: str
    signal: str | None
    resumed_as: str | None
    steps_lost: int | None
    saved_s: float | None
    same_bits: bool | None
    hosts: list[str]
    problem: str


@dataclass(frozen=True)
class Report:
    """What a drill has found.

    Attributes:
        facts: What the cluster says of itself.
        rows: What came of each interruption.
        shortfalls: Which facts break a promise, and what to set.
    """

    facts: ClusterFacts
    rows: list[Row]
    shortfalls: list[Shortfall]

    @property
    def as_promised(self) -> bool:
        """Whether every promise holds on this cluster."""
        broken = any(shortfall.breaks for shortfall in self.shortfalls)
        return not broken and all(not row.problem for row in self.rows)


def make_report(facts: ClusterFacts, drills: Sequence[Drilled], undisturbed: Drilled) -> Report:
    """Compare each run with the undisturbed one, and judge. Loads torch."""
    found = shortfalls(facts)
    status = undisturbed.run.status()
    if status.state != "finished":
        reason = f"the undisturbed run {status.state}: {undisturbed.problem or status.reason}"
        found.append(Shortfall(f"{reason}; see {undisturbed.run.logs}", breaks=True))
    rows = [_row(drilled, undisturbed.run) for drilled in drills]
    hosts = {host for row in rows for host in row.hosts} | set(_hosts(status))
    return Report(facts, rows, [*found, *_shortfalls_of_rows(rows, facts, hosts)])


def _row(drilled: Drilled, undisturbed: Run) -> Row:
    from flowjobs.training.same_bits import differences  # loads torch

    assert drilled.how is not None
    status = drilled.run.status()
    hosts = _hosts(status)
    before, after = _both_sides(status.attempts, drilled.interrupted)
    if before is None or after is None:
        problem = drilled.problem or _problem_of_no_restart(status, before)
        return Row(drilled.how.way, None, None, None, None, None, hosts, problem)
    steps_lost = max(drilled.reached, before.last_step or 0) - (after.first_step or 0)
    same_job = before.job.job_id == after.job.job_id
    resumed_as = "same job" if same_job else f"new job {after.job.job_id}"
    signal = re.search(r"SIG[A-Z]+\d*", before.reason)
    finished = status.state == "finished"
    differs = differences(drilled.run, undisturbed) if finished else []
    problem = drilled.problem
    if not finished:
        problem = problem or f"{status.state}: {status.reason}"
    elif differs:
        problem = problem or f"not the same: {', '.join(differs)}"
    elif steps_lost and drilled.how.saves:
        problem = problem or f"{steps_lost} steps were not saved"
    return Row(
        way=drilled.how.way,
        signal=signal.group() if signal else None,
        resumed_as="submitted again" if drilled.by_drill else resumed_as,
        steps_lost=steps_lost,
        saved_s=drilled.saved_s if drilled.how.saves else None,
        same_bits=not differs if finished else None,
        hosts=hosts,
        problem=problem,
    )


def _hosts(status: RunStatus) -> list[str]:
    return [attempt.job.host for attempt in status.attempts]


def _both_sides(
    attempts: Sequence[AttemptRecord], told: int
) -> tuple[AttemptRecord | None, AttemptRecord | None]:
    """The attempt that was interrupted and the one after it."""
    before = attempts[told - 1] if told else None
    return before, attempts[told] if told and len(attempts) > told else None


def _problem_of_no_restart(status: RunStatus, before: AttemptRecord | None) -> str:
    if status.state == "finished":
        return "finished before it was interrupted: give it more --steps"
    where = "did not resume" if before else "never trained"
    return f"{where}: {status.state} {status.reason}".rstrip()


def _shortfalls_of_rows(
    rows: Sequence[Row], facts: ClusterFacts, hosts: Collection[str]
) -> list[Shortfall]:
    found = []
    times = [row.saved_s for row in rows if row.saved_s is not None]
    if times and facts.notice_s is not None and max(times) > facts.notice_s:
        found.append(
            Shortfall(
                f"saving took up to {max(times):.1f} s, and this cluster kills "
                f"{facts.notice_s:g} s after the first signal: steps since the last checkpoint "
                "may be lost: --checkpoint-every-s 30, or --study on a faster file system"
            )
        )
    if any(row.same_bits is False for row in rows) and len(hosts) > 1:
        found.append(
            Shortfall(
                f"the attempts ran on {', '.join(sorted(hosts))}: processors of different types "
                "give different bits; --constraint keeps a run on nodes of one type"
            )
        )
    return found
