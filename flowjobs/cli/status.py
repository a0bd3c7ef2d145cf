"""flowjobs status."""

import dataclasses
import functools
import sys
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.json_output import print_json
from flowjobs.cli.overview import print_groups, print_overview, watch
from flowjobs.cli.parser import Flag
from flowjobs.cli.runs_named import RunNames, never_made, readable_runs
from flowjobs.errors import ConfigError
from flowjobs.formatting import first_of
from flowjobs.runs.hint import hint
from flowjobs.runs.listing import glances
from flowjobs.runs.progress import current_progress, state_in_words, steps_per_s, time_left_s
from flowjobs.runs.run import Run, absolute
from flowjobs.runs.selection import names_one_run
from flowjobs.runs.status import RunStatus

if TYPE_CHECKING:
    from flowjobs.jobs.dead_jobs import Finding
    from flowjobs.jobs.run_stages import Stage

# So many runs have a line each on one screen.
FEW = 20


@dataclass(frozen=True)
class Status(InStudy):
    """Show the state of a study's sweeps and groups, of its runs, or of one run's attempts."""

    names: Annotated[RunNames, tyro.conf.arg(metavar="[RUN...]")] = ()
    """Names, patterns, a sweep, a group, or FIELD=VALUE (flow=otcfm state=failed); default: all."""

    runs: Flag = False
    """A line for each run, where there are many; a selection has one anyway."""

    watch: Flag = False
    """Show it again every few seconds, until nothing runs or waits, it stays unknown whether
    something does, or Ctrl-C: redrawn in a terminal, elsewhere the lines that have changed."""

    json: Flag = False
    """Print JSON: the runs with all that is known of them, a run's own name alone as one object."""

    def run(self, defaults: Defaults) -> int:
        """Print. Returns the exit code."""
        if self.watch:
            if self.json:
                raise ConfigError("found --watch and --json, expected one of them")
            again = hint("status", *self.names, "--watch", study=self.study)
            watch(functools.partial(self._show, defaults), again)
        else:
            self._show(defaults)
        return 0

    def _show(self, defaults: Defaults) -> "Collection[Stage]":
        """Print once. Returns how the runs stand, for who watches."""
        # Slow to load, and --help does without.
        from flowjobs.jobs.dead_jobs import find_dead_jobs
        from flowjobs.jobs.run_stages import overview, stages_of, unsettled

        study = absolute(self.study)
        seen = [] if self.names else glances(study)
        if len(seen) > FEW and not (self.runs or self.json):
            findings = find_dead_jobs(unsettled(study, seen), at_most_twice=True)
            groups = overview(study, seen, findings)
            print_overview(groups)
            return {stage for group in groups for stage in group.counts}
        named = names_one_run(self.study, self.names)
        runs, broken = readable_runs(self.study, self.names)
        findings = find_dead_jobs(runs, at_most_twice=True)
        found = [describe(run, findings.get(run)) for run in runs]
        found += [_describe_broken(run) for run in broken]
        found.sort(key=itemgetter("run"))
        missing = [*never_made(defaults, study, self.names)]
        of_sweep = f"of the sweep, not in the study: {first_of(missing)}\n" if missing else ""
        if not found:
            print(f"there are no runs in {study}", file=sys.stderr)
        if self.json:
            print(of_sweep, end="", file=sys.stderr)
            print_json(found[0] if named else found)
            return ()
        if len(seen) > 1:
            print_groups(overview(study, seen, findings))
            print()
        if found:
            from flowjobs.cli.table import print_table

            print_table(found)
        _print_waits(found)
        print(of_sweep, end="")
        for run in found:
            _print_notes(run, named=named)
        if named:
            print_attempts(found[0])
            print(f"folder {found[0]['folder']}\nweights {found[0]['checkpoints']}")
        return stages_of([*runs, *broken], findings) if self.watch else ()


def _print_waits(runs: list[dict[str, Any]]) -> None:
    """Why runs wait, each reason once."""
    from flowjobs.cli.table import print_text

    waiting: dict[str, list[str]] = {}
    for run in runs:
        waiting.setdefault(run["waits"], []).append(run["run"])
    for why, names in waiting.items():
        if why:
            print_text(f"{first_of(names)} wait{'s' if len(names) == 1 else ''} {why}")


def _print_notes(run: dict[str, Any], *, named: bool) -> None:
    """Print what is to be known of a run beside its line."""
    from flowjobs.cli.table import print_text

    # Else its attempts say so, and of one that was submitted again that is no news.
    if run["state"] == "failed" and not (named or run["waits"]):
        print_text(f"{run['run']} failed: {run['reason']}")
    if run["unknown"]:
        print_text(f"{run['run']}: {run['unknown']}", stderr=True)
    if run["silent"]:
        print(f"{run['run']}: {run['silent']}")
    if run["wandb"]:  # a command is in it
        print(f"{run['run']}: W&B does not have all of it: {run['wandb']}")


def _describe_broken(run: Run) -> dict[str, Any]:
    """What is known of a run whose record cannot be read; `describe` fills in that of others."""
    return {
        "run": run.name,
        **dataclasses.asdict(RunStatus()),
        "state": "unknown",
        "state_in_words": "unknown",
        "latest": {},
        "steps_per_s": None,
        "left_s": None,
        "jobs": [],
        "waits": "",
        "unknown": "",
        "silent": "",
        "wandb": "",
        "folder": str(run.folder),
        "checkpoints": str(run.checkpoints),
    }


def describe(run: Run, finding: "Finding | None") -> dict[str, Any]:
    """All that is known of a run, as `--json` prints it.

    Returns:
        By name: `run`; all of `RunStatus` (state, reason, step, epoch, best_val_loss, …) with
        `attempts` as a list of `AttemptRecord`, both in runs/status.py; `state_in_words`;
        `latest`, the newest value of each key of metrics.jsonl; `steps_per_s` and `left_s`, null
        where they cannot be told; `jobs`, the lines of jobs.jsonl; `waits`, `unknown`, `silent` and
        `wandb`, why it waits, why its state is unknown, how long nothing was heard of it, and what
        W&B lacks, each empty where it is not so; `folder` and `checkpoints`. `show` adds `config`,
        what is not the default; `time`, in seconds, as in runs/goodput.py; and `files`.
    """
    from flowjobs.jobs.dead_jobs import DeadJob, final_outcome
    from flowjobs.jobs.run_stages import silence
    from flowjobs.slurm.jobs import Unknown
    from flowjobs.slurm.waiting import Waiting
    from flowjobs.tracking.record import read_uploaded

    status, latest = current_progress(run)
    waits = finding.newer if isinstance(finding, DeadJob) else finding
    if isinstance(finding, DeadJob):
        # Shown, not noted: that is what `reconcile` is for, and the run's own jobs.
        status.record_outcome_of_dead(final_outcome(run, status, finding), run.metrics_file)
    described = _describe_broken(run) | dataclasses.asdict(status)
    if not status.epochs:  # its job has not begun
        described["epochs"] = run.config().training.epochs
    described["state_in_words"] = state_in_words(status)
    if isinstance(waits, Waiting):
        # How its last attempt ended says nothing of a run that a job waits to resume.
        described |= {"state_in_words": "waiting", "waits": waits.why}
    described["latest"] = latest
    silent = "" if finding else silence(run, status)
    # A hanging run would show the speed of before.
    described["steps_per_s"] = None if silent else steps_per_s(status)
    described["left_s"] = None if silent else time_left_s(status)
    described["jobs"] = [dataclasses.asdict(entry) for entry in run.submissions()]
    if isinstance(finding, Unknown):
        described["unknown"] = finding.why
    if refusal := read_uploaded(run).refusal:
        described["wandb"] = refusal.text
    described["silent"] = silent
    return described


def print_attempts(run: dict[str, Any]) -> None:
    """Print a line an attempt of a run that `describe` has described."""
    from flowjobs.cli.table import print_text

    for attempt in run["attempts"]:
        job = attempt["job"]
        where = f"{job['cluster']} job {job['job_id']}"
        if job["cluster"] == "none":
            where = f"in the foreground as process {job['job_id']}"
        steps = "no step"
        if attempt["first_step"] is not None:
            steps = f"steps {attempt['first_step']} to {attempt['last_step']}"
        reason = attempt["reason"]
        # "cancelled by scancel" has the state in it.
        stated = reason.startswith((attempt["state"], "interrupted"))
        ended = reason if stated else ": ".join(filter(None, (attempt["state"], reason)))
        line = (
            f"attempt {attempt['number']}: {_local_time(attempt['started'])}"
            f" for {_duration(attempt)}, {where} on {job['host']}, {steps}, {ended}"
        )
        print_text(line.rstrip())


def _local_time(text: str) -> str:
    """A time of the record, which is in UTC, on the clock of whoever looks."""
    return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M:%S %Z}"


def _duration(attempt: dict[str, Any]) -> str:
    """How long an attempt has taken so far."""
    ended = attempt["ended"]
    end = datetime.fromisoformat(ended) if ended else datetime.now(UTC)
    return str(end - datetime.fromisoformat(attempt["started"])).partition(".")[0]
