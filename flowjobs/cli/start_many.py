"""Submitting many runs, or training them here, with what is printed of it."""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from flowjobs.cli.defaults import CommandOptions, Defaults
from flowjobs.cli.output import print_rows
from flowjobs.cli.prepare import check_ranks
from flowjobs.errors import ConfigError, SubmissionUnknownError
from flowjobs.formatting import counted, first_of
from flowjobs.runs.hint import hint
from flowjobs.runs.status import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PREEMPTED

if TYPE_CHECKING:
    from flowjobs.jobs.executors import Cluster
    from flowjobs.jobs.run_stages import Member
    from flowjobs.jobs.snapshot import CodeChoice, CodePlan

REFUSALS_SHOWN = 3


def cluster_flag(command: CommandOptions, defaults: Defaults) -> list[str]:
    """`--cluster` of a command line, to be repeated in the next."""
    return ["--cluster", command.cluster] if "--cluster" in defaults.flags else []


@contextlib.contextmanager
def only_submitter(study: Path, locks: bool) -> Iterator[None]:
    """While the block lasts nobody else submits arrays of a study; says what was left half done.

    Args:
        study: Root of the study.
        locks: Whether to take the lock: not needed where nothing goes to Slurm.
    """
    from flowjobs.jobs.array import submitting

    nobody: AbstractContextManager[list[str]] = contextlib.nullcontext([])
    with submitting(study) if locks else nobody as settled:
        for said in settled:
            print(said)
        yield


def check_parallel(parallel: int | None, slots: int) -> None:
    """Raise a ConfigError if one job already trains more runs than are to run at a time."""
    if parallel is not None and parallel < slots:
        raise ConfigError(
            f"--parallel: found {parallel}, and each job trains {slots} runs at a time: expected "
            f"at least {slots}, or fewer runs per GPU"
        )


def plan_code_of(members: Sequence["Member"], choice: "CodeChoice") -> "list[CodePlan]":
    """What code each run is trained with; what they have in common is taken once."""
    from flowjobs.jobs.snapshot import plan_code, take_snapshot

    take = functools.cache(take_snapshot)
    return [plan_code(member.run, member.config.training, choice, take=take) for member in members]


def that_can_be_started(members: Sequence["Member"]) -> "list[Member]":
    """Those of the runs that are not refused; says why the others are."""
    from flowjobs.sweeps.plan import refusals

    refused = refusals(members)
    for why in [*refused.values()][:REFUSALS_SHOWN]:
        print(f"error: {why}", file=sys.stderr)
    if refused:
        names = first_of([run.name for run in refused], REFUSALS_SHOWN)
        print(f"error: so not started: {names}", file=sys.stderr)
    return [member for member in members if member.run not in refused]


def check_ranks_of(members: Sequence["Member"], cluster: "Cluster") -> None:
    """Raise a ConfigError where the ranks of a run surely cannot share its batches equally."""
    from flowjobs.jobs.executors import ranks_of
    from flowjobs.sweeps.plan import resource_sets

    for of_set in resource_sets(members):
        ranks = ranks_of(cluster, of_set[0].config.slurm)
        configs = [member.config.training for member in of_set]
        check_ranks(configs, of_set[0].run.study, ranks)


def submit_many(
    members: Sequence["Member"],
    code: Sequence["CodePlan"],
    name: str,
    parallel: int | None,
    slots: int,
    again: str,
    words: Sequence[str],
    others: Sequence["Member"] = (),
) -> None:
    """Submit runs to Slurm.

    Args:
        members: The runs.
        code: The code of each.
        name: The arrays' name in the queue.
        parallel: How many run at a time, of these and the others.
        slots: How many share a job.
        again: The command that submits what the cluster does not take now.
        words: What selects them.
        others: Runs of which some may wait or run, in arrays that share what is asked for.
    """
    from flowjobs.sweeps.submit_arrays import Submitted, submit_arrays

    if not members:
        return
    done = Submitted()
    part = None if parallel is None else share(others, members, parallel, slots)[1]
    try:
        submit_arrays(members, code, name, part, slots, done)
    except SubmissionUnknownError:
        parallel = None  # an array that the cluster may have taken keeps its part
        raise
    finally:  # also if another was refused, or Ctrl-C came: these are in the queue
        print_notes(done.notes)
        for job_id, runs in done.jobs.items():
            print(f"{'submitted':10} job {job_id}, {counted(runs)}")
        if done.left:
            print(
                f"the cluster does not take {counted(len(done.left))} more now ({done.why}): "
                f"{again} submits them when it does"
            )
        if parallel is not None and len(done.taken) < len(members):
            # What was not taken has no part in it.
            share([*others, *done.taken], [], parallel, slots)
    study = members[0].run.study
    for command in ("status", "wait", "cancel"):
        print_rows(**{command: hint(command, *words, study=study)})


def share(
    members: Sequence["Member"], starting: Sequence["Member"], parallel: int, slots: int
) -> tuple[bool, int]:
    """Divide `--parallel` among what is submitted already and what will be; see `share_parallel`.

    Returns:
        Whether there is an array already; and how many of those that will be submitted may run.
    """
    from flowjobs.sweeps.submit_arrays import share_parallel

    changed, left = share_parallel(members, starting, parallel, slots)
    for job_id, at_once in changed.items():
        if isinstance(at_once, int):
            print(f"job {job_id} runs {at_once} at a time from now on")
        else:
            print(f"error: {at_once}", file=sys.stderr)
    return bool(changed), left


def train_many_here(
    members: Sequence["Member"],
    code: Sequence["CodePlan"],
    parallel: int | None,
    slots: int,
    again: str,
) -> int:
    """Train runs on this machine, a few at a time, until all have ended. Returns the exit code."""
    from flowjobs.sweeps.local import run_here, slots_here

    if not members:
        return 0
    ends: Counter[str] = Counter()
    parallel = min(len(members), parallel or slots * slots_here(members[0].config.slurm))
    try:
        for event in run_here(members, code, parallel):
            if event is None:
                continue
            status = event.status
            if event.what != "ended" or status is None or status.state == "submitted":
                ends[event.what] += event.what != "started"
                why = f"{': ' if event.why else ''}{event.why}"
                print(f"{'':9}  {event.run.name} {event.what}{why}", flush=True)
                continue
            ends[status.state] += 1
            reason = "" if status.state == "finished" else f": {status.reason}"
            count = f"{ends.total()}/{len(members)}"
            print(f"{count:>9}  {event.run.name} {status.state}{reason}", flush=True)
    except KeyboardInterrupt:
        print(
            f"\nno more runs are started; those that train keep running; {again} starts the others"
        )
        return EXIT_PREEMPTED
    if ends["not started"] and not ends["failed"]:
        return EXIT_BAD_INPUT
    return 0 if ends.total() == ends["finished"] + ends["left alone"] else EXIT_FAILED


def print_resources(members: Sequence["Member"], parallel: int | None, slots: int) -> None:
    """Print what the runs ask of the cluster, if so many share a job."""
    from flowjobs.sweeps.plan import resource_sets, resources_asked
    from flowjobs.sweeps.submit_arrays import tasks_of

    title = "asks for"
    for of_set in resource_sets(members):
        jobs = len(tasks_of(of_set, parallel, slots))
        print(f"{title:10} {resources_asked(of_set[0].config.slurm, len(of_set), jobs, slots)}")
        title = ""


def print_parallel(
    members: Sequence["Member"], starting: Sequence["Member"], parallel: int, slots: int
) -> None:
    """Print how many runs are trained at a time on Slurm.

    Args:
        members: Runs of which some may wait or run, in arrays that share what is asked for.
        starting: Those that are to be submitted.
        parallel: How many are asked for.
        slots: How many of those that are submitted share a job.
    """
    from flowjobs.sweeps.submit_arrays import arrays_left, at_a_time, jobs_at_once, new_arrays

    arrays, _ = arrays_left(members)
    parts = [*arrays.values(), *new_arrays(starting, parallel, slots)]
    n = at_a_time(parts, jobs_at_once(parts, parallel))
    arrays_said = counted(len(parts), "array")
    more = f", not {parallel}: at least one job of each array runs ({arrays_said})"
    print(f"{'':10} {n} at a time{more}" if n > parallel else f"{'':10} {parallel} at a time")


def print_notes(notes: Iterable[str]) -> None:
    """Print notes, each once."""
    for note in dict.fromkeys(note for note in notes if note):
        print(note)
