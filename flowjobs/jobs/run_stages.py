"""How far each run is, and whether it needs action. Read-only.

Decided in two ways. `overview`, for `status`, has two small files a run and what was found of its
job, so that thousands are shown at once. `stages`, for whoever starts, awaits or removes runs,
reads all of a run and asks for every job of it, and so knows more: a run whose checkpoints are gone
is "failed" there, one that is asked to be longer "to resume".
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flowjobs.config import RunConfig
from flowjobs.errors import CheckpointGoneError, ConfigError, FlowjobsError, SubmissionError
from flowjobs.formatting import duration_words
from flowjobs.jobs.current_job import RunningJob, running_jobs
from flowjobs.jobs.dead_jobs import DeadJob, Finding, final_outcome, find_dead_jobs
from flowjobs.jobs.exit_cause import OUT_OF_GPU_MEMORY, OUT_OF_MEMORY
from flowjobs.runs.extending import out_of_patience
from flowjobs.runs.files import warn_once
from flowjobs.runs.hint import hint
from flowjobs.runs.listing import Glance, glances
from flowjobs.runs.newest_job import ended_for_good, local_job
from flowjobs.runs.progress import silent_s
from flowjobs.runs.run import Run, has_done
from flowjobs.runs.selection import runs_of_sweep, sweep_names
from flowjobs.runs.status import RunStatus, read_sound_status
from flowjobs.slurm.jobs import Unknown
from flowjobs.slurm.waiting import Waiting

# In the order in which they are shown. Of a run "to resume" or "new" no job waits or runs; "new"
# never had one.
Stage = Literal[
    "finished", "running", "waiting", "to resume", "new", "cancelled", "failed", "unknown"
]
NEEDS_ACTION = ("to resume", "new", "failed", "unknown")
TO_START: tuple[Stage, ...] = ("to resume", "new")
# Causes of "failed" that no attempt records as its kind.
GPU_MEMORY = "GPU out of memory"
CHECKPOINTS_GONE = "checkpoints gone"
HELD_SHOWN = 3


@dataclass(frozen=True)
class Standing:
    """How a run stands, as `status` shows it.

    Attributes:
        glance: The run.
        stage: In a word.
        why: Why it waits or failed, or why nothing is known of it.
        stuck: Whether it waits, and never starts as it is; or trains, and nothing is heard of it.
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
    sweeps = sweep_names(study)
    for name in sweeps:
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
    # By the word that selects it: a sweep's runs have its name for a group.
    words = {name: f"group={name}" if name in sweeps else name for name in sorted(by_group)}
    return groups + [Group(word, by_group[name]) for name, word in words.items()]


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
    if glance.state == "running":
        run = Run(study, glance.name)
        try:
            silent = silence(run, run.status())
        except (FlowjobsError, OSError) as error:
            return Standing(glance, "unknown", str(error))
        return Standing(glance, "running", silent, stuck=bool(silent))
    if not (glance.unsettled and glance.state in ("submitted", "preempted")):
        return _settled(glance)
    run = Run(study, glance.name)
    newest = run.newest_job()
    if newest and (newest.cluster == "slurm" or local_job(run, [newest])):
        return Standing(glance, "waiting", "for its job to start")
    return _settled(glance)


def _settled(glance: Glance) -> Standing:
    match glance.state:
        case "finished" | "cancelled" | "failed" as stage:
            return Standing(glance, stage, glance.reason)
        case "preempted":
            why = f"{glance.reason}; no job of it is left: submit it again"
            return Standing(glance, "to resume", why)
        case "submitted":
            return Standing(glance, "new", "never submitted")
    return Standing(glance, "unknown", glance.reason)


def silence(run: Run, status: RunStatus) -> str:
    """What to say of a run that trains if nothing has been heard of it for too long; else empty."""
    seconds = silent_s(status, run.metrics_file)
    if seconds is None:
        return ""
    job = status.attempts[-1].job
    words = f"nothing heard of it for {duration_words(seconds)}, on {job.host}"
    if job.log:
        words += f": `{hint('logs', run.name, study=run.study)}`"
    # That of a pack would have the others leave as well, and this one may be waited for.
    own = job.cluster == "slurm" and not job.packed
    options = run.read_config_file().get("slurm", {}).get("sbatch", {})
    if own and "no-requeue" not in options:
        words += f"; `scontrol requeue {job.job_id}` starts it again from its checkpoint"
    return words


@dataclass(frozen=True)
class Member:
    """A run, and how far it is for what is asked of it.

    Attributes:
        run: The run.
        config: What is asked for.
        stage: How far it is.
        why: The cause in a word or two if it has failed; why it is unknown, as a sentence; the
            reason, to be read after "waits", if it waits and Slurm says it. What was cancelled has
            one only where it cannot be resumed, what is finished only where the epochs that it is
            given would not be trained.
        stuck: Whether it waits, and never starts as it is.
        jobs_unknown: Why it is unknown whether a job of a cancelled run lives, as a sentence; empty
            if none does.
    """

    run: Run
    config: RunConfig
    stage: Stage
    why: str = ""
    stuck: bool = False
    jobs_unknown: str = ""


def stages(asked: Mapping[Run, RunConfig]) -> dict[Run, Member]:
    """How far runs are that are there; `asked` is the config that each is to be started with."""
    members: dict[Run, Member] = {}
    statuses: dict[Run, RunStatus] = {}
    for run, config in asked.items():
        try:
            run.config()
            # Taken for none, as an attempt does, a damaged one would have the run started again.
            statuses[run] = read_sound_status(run.status_file)
            run.submissions()
        except (FlowjobsError, OSError) as error:
            members[run] = Member(run, config, "unknown", str(error))
    busy = running_jobs([*statuses], statuses)
    findings = find_dead_jobs([run for run in statuses if run not in busy])
    for run, status in statuses.items():
        try:
            if run in busy:
                members[run] = _with_job(run, asked[run], status, busy[run])
            else:
                members[run] = _as_found(run, asked[run], status, findings.get(run))
        except (FlowjobsError, OSError) as error:
            members[run] = Member(run, asked[run], "unknown", str(error))
    return members


def _with_job(
    run: Run, config: RunConfig, status: RunStatus, job: RunningJob | SubmissionError
) -> Member:
    """A run of which a job waits or runs, or may; see `running_jobs`."""
    if isinstance(job, SubmissionError):
        if run.cancel_requested():
            # Its jobs see that, if there are any; started again, they would train as well.
            return Member(run, config, "cancelled", jobs_unknown=str(job))
        return Member(run, config, "unknown", str(job))
    # In a job that several share, some may wait for their turn.
    begun = job.state != "pending" and (status.open_attempt is not None or _ends(run))
    stage: Stage = "running" if begun else "waiting"
    waits = job.waits or Waiting("")
    return Member(run, config, stage, waits.why, stuck=waits.stuck)


def _ends(run: Run) -> bool:
    """Whether the newest job is one of this machine that has trained: its process is about to end.

    One that starts again, as after a time limit, waits.
    """
    job = run.newest_job()
    if job is None or job.cluster != "local" or job.pack:
        return False
    return ended_for_good(run, job)


def _as_found(run: Run, config: RunConfig, status: RunStatus, finding: Finding | None) -> Member:
    """A run of which no job is known to wait or run, by what was found of its newest."""
    match finding:
        case DeadJob(slurm_restarts_it=True):
            return Member(run, config, "waiting")
        case DeadJob() as dead:
            status.record_outcome(final_outcome(run, status, dead))
        case Unknown(why):
            return Member(run, config, "unknown", why)
        case Waiting(why, stuck):
            return Member(run, config, "waiting", why, stuck=stuck)
    return _without_job(run, config, status)


def _without_job(run: Run, config: RunConfig, status: RunStatus) -> Member:
    """A run of which no job waits or runs."""
    if has_done(status, config.training.epochs, config.training.patience):
        return Member(run, config, "finished")
    stage = _stage_without_job(run, status)
    if stage == "unknown":
        why = "its job has just ended, and Slurm does not say yet how: ask again"
        return Member(run, config, "unknown", why)
    if stage == "to resume":
        own, asked = run.config().training, config.training
        if why := out_of_patience(run.name, own, asked, status, run.metrics_file):
            if status.state == "finished":
                return Member(run, config, "finished", why)
            # Interrupted before it could say that it is: it is resumed to its own end.
            as_long = replace(asked, epochs=own.epochs, patience=own.patience)
            config = replace(config, training=as_long)
    try:
        run.check_files(config.training)
    except CheckpointGoneError as error:
        if _is_away(run.checkpoints):
            return Member(run, config, "unknown", str(error))
        # That is known, and started again it would fail at once.
        stage = "cancelled" if stage == "cancelled" else "failed"
        return Member(run, config, stage, CHECKPOINTS_GONE)
    return Member(run, config, stage, _cause(status) if stage == "failed" else "")


def _stage_without_job(run: Run, status: RunStatus) -> Stage:
    if run.cancel_requested():
        return "cancelled"
    match status.state:
        case "failed" | "cancelled" as stage:
            return stage
        case "preempted" | "finished":  # finished before it was asked to be longer
            return "to resume"
        case "submitted" if not run.submissions():
            return "new"
    return "unknown"


def _is_away(checkpoints: Path) -> bool:
    """Whether the disk that a run's checkpoints are on is, as when scratch is not mounted."""
    dangles = checkpoints.is_symlink() and not checkpoints.exists()
    return dangles or not checkpoints.parent.exists()


def _cause(status: RunStatus) -> str:
    """Why a run failed, in a word or two."""
    kind = status.attempts[-1].kind if status.attempts else ""
    # For Slurm these are exceptions like any other.
    if OUT_OF_GPU_MEMORY.search(status.reason):
        return GPU_MEMORY
    if kind == "exception" and OUT_OF_MEMORY.search(status.reason):
        return "out of memory"
    if kind == "no progress" and "time limit" in status.reason:
        return "time limit"
    return kind or "failed"


def lacks_best(run: Run) -> bool:
    """Whether the best.pt of a finished run is known to be gone, as after a purge of its disk."""
    try:
        # Not Path.exists: NFS remembers for a while that a file was not there.
        run.best.open("rb").close()
    except FileNotFoundError:
        return not _is_away(run.checkpoints)
    except OSError:
        pass  # unknown
    return False


def held_for(members: Iterable[Member]) -> list[str]:
    """Why some of the runs wait that will not start as they are; the first few reasons."""
    return sorted({member.why for member in members if member.stuck})[:HELD_SHOWN]
