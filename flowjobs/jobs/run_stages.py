"""State of the runs by sweep or group, and which need action. Read-only."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flowjobs.errors import ConfigError
from flowjobs.jobs.dead_jobs import DeadJob, Finding, final_outcome
from flowjobs.runs.files import warn_once
from flowjobs.runs.hint import hint
from flowjobs.runs.listing import Glance, glances
from flowjobs.runs.newest_job import local_job
from flowjobs.runs.run import Run
from flowjobs.runs.selection import runs_of_sweep, sweep_names
from flowjobs.slurm.jobs import Unknown
from flowjobs.slurm.waiting import Waiting

# In the order in which they are shown. Of a run "to resume" or "new" no job waits or runs; "new"
# never had one. sweeps/plan.py knows more of a run than its two files here say: one whose
# checkpoints are gone is "failed" there, one that is asked to be longer "to resume".
Stage = Literal[
    "finished", "running", "waiting", "to resume", "new", "cancelled", "failed", "unknown"
]
NEEDS_ACTION = ("to resume", "new", "failed", "unknown")


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        glance: The run.
        stage: In a word.
        why: Why it waits or failed, or why nothing is known of it.
        stuck: Whether it waits, and never starts as it is.
    """

    glance: Glance
    stage: Stage
    why: str = ""
    stuck: bool = False

    @property
    def needs_action(self) -> bool:
        """Whether nothing more happens to it by itself."""
        return self.stuck or self.stage in NEEDS_ACTION


@dataclass(frozen=True)
class Group:
    """The runs of a sweep, or of a group in W&B outside of any sweep.

    Attributes:
        name: Its name.
        standings: Its runs.
        missing: Runs of the sweep that were never made.
    """

    name: str
    standings: Sequence[Standing] = field(default_factory=list)
    missing: int = 0

    @property
    def counts(self) -> Counter[Stage]:
        """How many runs stand how."""
        return Counter(standing.stage for standing in self.standings)

    @property
    def total(self) -> int:
        """How many runs there are to be."""
        return len(self.standings) + self.missing

    @property
    def progress(self) -> float:
        """The share of the epochs that is done; a run that has finished early counts as whole."""
        done = sum(
            1.0
            if standing.stage == "finished"
            else min(1.0, standing.glance.epoch / max(1, standing.glance.epochs))
            for standing in self.standings
        )
        return done / max(1, self.total)

    @property
    def left_s(self) -> float | None:
        """How long it takes with as many runs at a time as now; None if none runs, or no speed is
        known."""
        glances = [standing.glance for standing in self.standings]
        epochs = sum(glance.epoch for glance in glances)
        running = self.counts["running"]
        if not (epochs and running):
            return None
        to_do = [
            standing.glance
            for standing in self.standings
            if standing.stage in ("running", "waiting")
        ]
        left = sum(max(0, glance.epochs - glance.epoch) for glance in to_do)
        return sum(glance.trained_s for glance in glances) / epochs * left / running


def unsettled(study: Path, some: Sequence[Glance]) -> list[Run]:
    """The runs of which a job may wait or run, or have ended unnoticed; see `find_dead_jobs`."""
    return [Run(study, glance.name) for glance in some if glance.unsettled]


def overview(study: Path, some: Sequence[Glance], findings: Mapping[Run, Finding]) -> list[Group]:
    """The groups of a study, its sweeps first, by name; those of no run are left out.

    Args:
        study: Its root.
        some: Its runs.
        findings: What was found of those that are `unsettled`.
    """
    standings = {
        glance.name: _standing(study, glance, findings.get(Run(study, glance.name)))
        for glance in some
    }
    groups = []
    outside = dict(standings)
    for name in sweep_names(study):
        try:
            names = runs_of_sweep(study, name)
        except ConfigError as error:
            warn_once(str(error))  # its runs are shown by their groups
            continue
        there = [standings[run] for run in names if run in standings]
        groups.append(Group(name, there, missing=len(names) - len(there)))
        for run in names:
            outside.pop(run, None)
    by_group: dict[str, list[Standing]] = {}
    for standing in outside.values():
        by_group.setdefault(standing.glance.group, []).append(standing)
    return groups + [Group(name, by_group[name]) for name in sorted(by_group)]


def stages_of(runs: Iterable[Run], findings: Mapping[Run, Finding]) -> set[Stage]:
    """How runs stand; see `overview`."""
    names: dict[Path, list[str]] = {}
    for run in runs:
        names.setdefault(run.study, []).append(run.name)
    return {
        _standing(study, glance, findings.get(Run(study, glance.name))).stage
        for study, of_study in names.items()
        for glance in glances(study, of_study)
    }


def _standing(study: Path, glance: Glance, finding: Finding | None) -> Standing:
    match finding:
        case Waiting(why, stuck) | DeadJob(newer=Waiting(why, stuck)):
            return Standing(glance, "waiting", why, stuck)
        case Unknown(why):
            return Standing(glance, "unknown", why)
        case DeadJob():
            run = Run(study, glance.name)
            outcome = final_outcome(run, run.status(), finding)
            if finding.slurm_restarts_it:
                return Standing(glance, "waiting", outcome.reason)
            ended = replace(glance, state=outcome.state, reason=outcome.reason, kind=outcome.kind)
            if outcome.state == "preempted":
                # Not the outcome's reason, which has it that it starts again.
                reconcile = hint("reconcile", study=study)
                why = f"{finding.outcome.reason}; `{reconcile}` or submitting it resumes it"
                return Standing(ended, "to resume", why)
            return _settled(ended)
    if not (glance.unsettled and glance.state in ("submitted", "preempted")):
        return _settled(glance)
    run = Run(study, glance.name)
    newest = run.newest_job()
    if newest and (newest.cluster == "slurm" or local_job(run, [newest])):
        return Standing(glance, "waiting", "for its job to start")
    return _settled(glance)


def _settled(glance: Glance) -> Standing:
    match glance.state:
        case "finished" | "running" | "cancelled" | "failed" as stage:
            return Standing(glance, stage, glance.reason)
        case "preempted":
            why = f"{glance.reason}; no job of it is left: submit it again"
            return Standing(glance, "to resume", why)
        case "submitted":
            return Standing(glance, "new", "never submitted")
    return Standing(glance, "unknown", glance.reason)
