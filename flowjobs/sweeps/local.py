"""Runs of a sweep on this machine, a few at a time, from a process in the foreground."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flowjobs.config import SlurmConfig
from flowjobs.errors import FlowjobsError
from flowjobs.jobs.current_job import running_job
from flowjobs.jobs.executors import check_local, visible_gpus
from flowjobs.jobs.origin import Origin
from flowjobs.jobs.run_stages import Member
from flowjobs.jobs.snapshot import CodePlan
from flowjobs.jobs.submit import submit
from flowjobs.jobs.tasks import task_of
from flowjobs.runs.files import AWAY_AT_MOST_S, warn_once
from flowjobs.runs.process import process_lives
from flowjobs.runs.run import Run, undone_if_refused
from flowjobs.runs.status import RunStatus
from flowjobs.sweeps.submit_arrays import make_runs

POLL_S = 0.3


@dataclass(frozen=True)
class Event:
    """Something that the user may want to see.

    Attributes:
        run: The run.
        what: What it did; "unknown" where that cannot be read.
        why: Why it was left alone or could not start, or why that is unknown.
        status: Its status, when it has ended.
    """

    run: Run
    what: Literal["started", "ended", "left alone", "not started", "unknown"]
    why: str = ""
    status: RunStatus | None = None


def run_here(
    members: Sequence[Member], code: Sequence[CodePlan], parallel: int
) -> Iterator[Event | None]:
    """Train runs as jobs of this machine, so many at a time, until all have ended.

    They are jobs of their own: if this process ends, those that have started are trained to their
    end, and the others are not started.

    Yields:
        What happens; None every moment in between.
    """
    waiting = list(zip(members, code, map(_known_cancel, members), strict=True))
    running: dict[int, Run] = {}
    away_since: dict[Run, float] = {}
    while waiting or running:
        for slot in range(parallel):
            while slot not in running and waiting:
                event = _start(*waiting.pop(0), slot)
                if event.what == "started":
                    running[slot] = event.run
                yield event
        time.sleep(POLL_S)
        yield None
        for slot, run in list(running.items()):
            try:
                lives = _job_lives(run)
                ended = Event(run, "ended", status=None if lives else run.status())
                away_since.pop(run, None)
            except (FlowjobsError, OSError) as error:
                now = time.monotonic()
                lives = now - away_since.setdefault(run, now) < AWAY_AT_MOST_S
                why = f"whether it still trains cannot be read ({error})"
                ended = Event(run, "unknown", f"{why}; its slot is free")
                warn_once(f"{run.name}: {why}; its slot stays taken until it can be")
            if not lives:
                del running[slot]
                yield ended


def _job_lives(run: Run) -> bool:
    # A job that is started again often gets a new id.
    newest = run.newest_job()
    return newest is not None and process_lives(int(newest.job_id), newest.process)


def _known_cancel(member: Member) -> float | None:
    """Since when a run is cancelled that is to be started all the same; see `_start`."""
    with contextlib.suppress(OSError):
        return member.run.cancelled_at() if member.stage == "cancelled" else None
    return None


def _start(member: Member, code: CodePlan, known_cancel: float | None, slot: int) -> Event:
    run = member.run
    try:
        with run.one_submits():
            if busy := running_job(run):  # started from another terminal since the plan was made
                return Event(run, "left alone", f"it has {busy} by now")
            if run.cancelled_at() not in (None, known_cancel):  # perhaps once more
                return Event(run, "left alone", "it was cancelled meanwhile")
            with undone_if_refused([run]):
                make_runs([member], [code])
                origin = Origin.here(member.config.slurm)
                gpus = gpus_of_slot(member.config.slurm, slot)
                if gpus:
                    devices = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
                    origin = replace(origin, environment={**origin.environment, **devices})
                submit(run, "local", task_of(run), origin=origin)
    except (FlowjobsError, OSError) as error:
        return Event(run, "not started", str(error))
    return Event(run, "started")


def gpus_of_slot(asked: SlurmConfig, slot: int) -> list[str]:
    """The GPUs of the run in a slot: its own while there are as many, else shared in turn."""
    each = len(check_local(asked))
    if not each:
        return []
    gpus = visible_gpus()
    slots = len(gpus) // each
    first = slot % slots * each
    return gpus[first : first + each]


def slots_here(asked: SlurmConfig) -> int:
    """How many runs this machine has room for: one for each GPU, or one."""
    each = len(check_local(asked))
    return len(visible_gpus()) // each if each else 1
