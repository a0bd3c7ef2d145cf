"""Compare the runs of a sweep with disk and Slurm: which are done, alive, failed, to be started.

For a finished run two small files are read and nothing else: a sweep of thousands that is
repeated mostly looks at those. Slurm is asked about all of the others together.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowjobs.config import (
    DATA_FIELDS,
    KEPT_UNLESS_GIVEN,
    RunConfig,
    SlurmConfig,
    is_data_file,
    signature_differences,
)
from flowjobs.errors import FlowjobsError, RunMismatchError
from flowjobs.field_values import flag
from flowjobs.formatting import counted, first_of
from flowjobs.jobs.run_stages import TO_START, Member, stages
from flowjobs.jobs.snapshot import CodePlan
from flowjobs.models.size import checkpoint_bytes_of
from flowjobs.runs.code import code_of
from flowjobs.runs.datasets import row_shape, same_file
from flowjobs.runs.files import read_json
from flowjobs.runs.run import Run, has_done, run_names
from flowjobs.runs.selection import fields_in, runs_of_sweep, sweep_names
from flowjobs.runs.status import RunStatus

SHOWN_AT_MOST = 10


def look_at(asked: Mapping[Run, RunConfig], given: frozenset[str]) -> list[Member]:
    """How far each run is.

    Args:
        asked: What is asked for, by run.
        given: Those of KEPT_UNLESS_GIVEN that are asked for.

    Returns:
        In the order of `asked`.

    Raises:
        RunMismatchError: Some exist with another config; the text lists what differs.
    """
    found: dict[Run, Member] = {}
    others: dict[Run, RunConfig] = {}
    differing: dict[Run, list[str]] = {}
    unread: dict[Run, Exception] = {}
    for run, wanted in asked.items():
        try:
            before = _json(run.config_file)
            if before is None and not run.status_file.exists():
                found[run] = Member(run, wanted, "new")
                continue
            # Where the config alone is lost, that is an error.
            training = (before or run.read_config_file()).get("training", {})
            config = _with_own(wanted, training, given)
            if lines := _differences(training, config):
                differing[run] = lines
            finished = not lines and _is_finished(run, config)
        except OSError as error:
            found[run] = Member(run, wanted, "unknown", str(error))
        except Exception as error:  # of the files nothing was checked: `stages` does
            unread[run], others[run] = error, wanted
        else:
            if finished:
                found[run] = Member(run, config, "finished")
            else:
                others[run] = config
    found |= stages(others)
    for run, met in unread.items():
        if found[run].stage != "unknown":
            raise met  # its files are as they should be: it is a bug
    if wrong := {run: lines for run, lines in differing.items() if _has_begun(found[run])}:
        raise RunMismatchError(_mismatch(wrong))
    return [found[run] for run in asked]


def _json(file: Path) -> dict[str, Any] | None:
    try:
        return read_json(file)
    except FileNotFoundError:
        return None


def _differences(training: Mapping[str, Any], config: RunConfig) -> list[str]:
    fields = vars(config.training)
    if all(name in training and training[name] == fields[name] for name in fields):
        return []  # of most, and they are many
    asked = config.training.to_dict()
    lines = signature_differences(training, asked)
    for field in DATA_FIELDS:
        there, here = training.get(field, ""), asked[field]
        # The signature shows another source, unless both are files.
        of_signature = field == "source" and not (is_data_file(str(there)) and is_data_file(here))
        if there != here and not of_signature and not same_file(there, here):
            lines.insert(0, f"  {flag(field)}: {there} there, {here} asked for")
    return lines


def _with_own(asked: RunConfig, training: Mapping[str, Any], given: frozenset[str]) -> RunConfig:
    own = {
        key: training[key]
        for key in KEPT_UNLESS_GIVEN
        if key in training and key not in given and training[key] != vars(asked.training)[key]
    }
    return replace(asked, training=replace(asked.training, **own)) if own else asked


def _is_finished(run: Run, config: RunConfig) -> bool:
    """Whether the run has done all that is asked for, without its status being checked in full."""
    found = _json(run.status_file) or {}
    keys = ("state", "epoch", "epochs", "patience")
    status = RunStatus(**{key: found[key] for key in keys if key in found})
    return has_done(status, config.training.epochs, config.training.patience)


def shorter_than_asked(member: Member) -> str:
    """What a run that is not started now keeps of its own length.

    Returns:
        Options: "--epochs 200" where 400 are asked for; empty if nothing, or that cannot be read.
    """
    try:
        own, asked = vars(member.run.config().training), vars(member.config.training)
    except (FlowjobsError, OSError):
        return ""
    return " ".join(
        f"{flag(key)} {own[key]}" for key in ("epochs", "patience") if own[key] < asked[key]
    )


def refusals(members: Iterable[Member]) -> dict[Run, str]:
    """Why runs cannot be started with what is asked of them: their data have changed, say.

    Writes nothing.
    """
    found = {}
    for member in members:
        try:
            if member.run.exists():
                member.run.merge(member.config)
                member.run.check_model(member.config.training)
        except (FlowjobsError, OSError) as error:
            found[member.run] = str(error)
    return found


def _has_begun(member: Member) -> bool:
    """Whether the run's config must stay: it has trained, or a job of it waits or runs."""
    return member.stage in ("running", "waiting", "finished") or member.run.started()


def _mismatch(differing: Mapping[Run, Sequence[str]]) -> str:
    """The differing fields, each kind of difference once with the runs that have it."""
    runs_with: dict[str, list[str]] = {}
    for run, lines in differing.items():
        runs_with.setdefault("\n".join(lines), []).append(run.name)
    study = next(iter(differing)).study
    names_of = {sweep: {*runs_of_sweep(study, sweep)} for sweep in sweep_names(study)}
    sweeps = [s for s, names in names_of.items() if any(run.name in names for run in differing)]
    there = f" (of the sweep {first_of(sweeps)})" if sweeps else ""
    one = "s" if len(differing) == 1 else ""
    text = [f"{len(differing)} of the runs exist{one} with another config{there}:"]
    for lines, names in list(runs_with.items())[:SHOWN_AT_MOST]:
        text += [f"{first_of(names)}:", lines]
    text += [
        "ask for the values there to resume those runs; or give several values of what differs, so "
        "that it is in the names of the new ones; or give the sweep a --study of its own"
    ]
    return "\n".join(text)


def with_other_code(members: Iterable[Member], plans: Iterable[CodePlan]) -> list[str]:
    """The names of runs that keep other code than those that are begun now, which may matter."""
    digests = {plan.code.digest for plan in plans if plan.code}
    names = []
    for member in members if digests else ():
        kept = code_of(member.run) if member.config.training.user_modules else None
        if kept and member.stage not in TO_START and kept.digest not in digests:
            names.append(member.run.name)
    return names


def same_as_others(new: Sequence[Member]) -> list[str]:
    """The new runs that the study has under another name: "a is the same run as b (finished)".

    The same config, data of the same name, and as long.
    """
    beside = ("epochs", "patience", *DATA_FIELDS)
    asked: dict[tuple[Any, ...], str] = {}
    for member in new:
        training = member.config.training
        key = (training.signature, *(getattr(training, field) for field in beside))
        asked[key] = member.run.name
    study, found = new[0].run.study, []
    for name in sorted({*run_names(study)} - {member.run.name for member in new}):
        run = Run(study, name)
        try:
            config = run.read_config_file()
            fields = fields_in(config)
            # Not computed from the fields: a study may have thousands of runs.
            if same := asked.get((config.get("signature"), *(fields[field] for field in beside))):
                found.append(f"{same} as {name} ({run.status().state})")
        except (FlowjobsError, OSError, TypeError):
            pass  # what cannot be read is no such run as far as is known
    return found


def resource_sets(members: Iterable[Member]) -> list[list[Member]]:
    """The runs by what they ask of the cluster."""
    sets: list[tuple[SlurmConfig, list[Member]]] = []
    for member in members:
        asked = member.config.slurm
        # Most have the very same; a dataclass that holds a dict cannot be a key.
        found = next((of_set for other, of_set in sets if other is asked or other == asked), None)
        if found is None:
            sets.append((asked, [member]))
        else:
            found.append(member)
    return [of_set for _, of_set in sets]


def resources_asked(slurm: SlurmConfig, runs: int, jobs: int, slots: int) -> str:
    """What so many runs ask of the cluster: "12 runs x 1 GPU x at most 2 h = 24 GPU hours".

    Args:
        slurm: What each job asks for.
        runs: How many runs there are.
        jobs: In how many jobs.
        slots: How many share a job at once.
    """
    if slots > 1:
        return f"{_resources(slurm, jobs, 'job')}; {runs} runs share them{_parts(slurm, slots)}"
    return _resources(slurm, runs, "run")


def _parts(slurm: SlurmConfig, slots: int) -> str:
    """What a run has of a job that so many share, as far as it is asked for."""
    words = [f"{slots} at once"]
    if slurm.cpus_per_task:
        words.append(f"{max(1, slurm.cpus_per_task // slots)} of {slurm.cpus_per_task} cores each")
    if slurm.mem_gb:
        words.append(f"{slurm.mem_gb / slots:.3g} of {slurm.mem_gb:g} GB each")
    return f", {', '.join(words)}"


def _resources(slurm: SlurmConfig, runs: int, what: str) -> str:
    gpus = slurm.nodes * slurm.gpus_per_node
    words = counted(runs, what) + (f" x {counted(gpus, 'GPU')}" if gpus else "")
    if slurm.timeout_min is None:
        return f"{words}, as long as the partition allows"
    hours = slurm.timeout_min / 60
    words += f" x {hours:.3g} h"
    return f"{words} = {runs * gpus * hours:.3g} GPU hours a start" if gpus else f"{words} a start"


def checkpoint_bytes(members: Sequence[Member], starting: Sequence[Member]) -> int | None:
    """About what the checkpoints of runs that are started will take, in bytes.

    Returns:
        None if no run of the same model among `members` has any yet, and no model's size is known.
    """
    sizes: dict[str, int | None] = {}
    for member in members:
        model = _model(member)
        if model not in sizes and member.stage == "finished":
            files = [file for file in member.run.saved_files() if file.exists()]
            sizes[model] = sum(file.stat().st_size for file in files)
    new = [member for member in starting if member.stage == "new"]
    for member in new:
        if (model := _model(member)) not in sizes:
            training = member.config.training
            shape = row_shape(training.dataset, member.run.study)
            sizes[model] = checkpoint_bytes_of(training, shape)
    wanted = [sizes[_model(member)] for member in new]
    known = [size for size in wanted if size]
    return sum(known) * len(wanted) // len(known) if known else None


def _model(member: Member) -> str:
    training = member.config.training
    found = [training.arch_path, training.model_args, training.dataset]
    return json.dumps(found, sort_keys=True)
