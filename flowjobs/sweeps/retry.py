"""Starting failed runs again: by cause, and with other resources where the same would not do.

What is changed are options of the cluster, and never what decides the result of a step.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from flowjobs.config import RestartConfig, RunConfig, SlurmConfig
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues, key_value
from flowjobs.formatting import first_of
from flowjobs.jobs.exit_cause import failed_node
from flowjobs.jobs.run_stages import CHECKPOINTS_GONE, GPU_MEMORY, Member
from flowjobs.nearest import meant
from flowjobs.runs.hint import hint
from flowjobs.runs.pack import Pack
from flowjobs.runs.run import Run
from flowjobs.slurm.options import FIELDS_OF_OPTIONS
from flowjobs.toml_values import typed_value

# No option of one run's: how many share a job.
RUNS_PER_GPU = "runs_per_gpu"
# Nor one of the cluster: the code as it is now, where it has changed.
NEW_CODE = "new_code"
# Nor any option at all: files that only their user can restore.
CHECKPOINTS = "checkpoints"
# They decide how many ranks compute a step, and so its bits.
RANKS = ("nodes", "gpus_per_node")
# "out of memory: 1.02 of 1 GiB".
OF_MEMORY = re.compile(r"of ([\d.e+]+) GiB")


@dataclass(frozen=True)
class Cause:
    """Runs that failed alike.

    Attributes:
        kind: In a word or two; "cancelled" for those that the user has ended.
        members: The runs.
        needs: What they need other or more of, an option as a rule: without, they would fail again.
        advice: What to say of that, "--with mem_gb=64"; or, where nothing is needed, of the cause.
    """

    kind: str
    members: Sequence[Member]
    needs: tuple[str, ...] = ()
    advice: str = ""


def causes(members: Sequence[Member]) -> list[Cause]:
    """The runs that may be started again, by what they have failed of."""
    by_cause: dict[str, list[Member]] = {}
    for member in members:
        if member.stage in ("failed", "cancelled") and not member.jobs_unknown:
            by_cause.setdefault(member.why or member.stage, []).append(member)
    return [_cause(kind, found) for kind, found in sorted(by_cause.items())]


def _cause(kind: str, members: Sequence[Member]) -> Cause:
    match kind:
        case "out of memory":
            asked = [member.config.slurm.mem_gb or _limit_gb(member) for member in members]
            known = [size for size in asked if size]
            size = f"{_next_size(max(known)):g}" if known else "..."
            advice = _fewer_at_once(members) or f"mem_gb={size}"
            return Cause(kind, members, ("mem_gb", RUNS_PER_GPU), f"--with {advice}")
        case "time limit":
            minutes = [member.config.slurm.timeout_min or 0 for member in members]
            size = f"{2 * max(minutes)}" if max(minutes) else "..."
            return Cause(kind, members, ("timeout_min",), f"--with timeout_min={size}")
        case _ if kind == GPU_MEMORY:
            options = ("gpu_type", "constraint", "partition", RUNS_PER_GPU)
            advice = _fewer_at_once(members) or "gpu_type=... (one of more memory)"
            return Cause(kind, members, options, f"--with {advice}")
        case _ if kind == CHECKPOINTS_GONE:
            advice = (
                "restore last.pt or best.pt of each (from a backup), or remove them "
                f"({hint('rm', '...', study=members[0].run.study)}) and submit anew"
            )
            return Cause(kind, members, (CHECKPOINTS,), advice)
        case "lost GPU":
            # Beside those that are left out already: --with puts its value in the place of that.
            slurms = [member.config.slurm for member in members]
            before = [str(of.exclude or of.sbatch.get("exclude") or "") for of in slurms]
            found = sorted(set().union(*(_nodes_of(member.run) for member in members)))
            nodes = ",".join(dict.fromkeys([*filter(None, before), *found]))
            words = f"on {first_of(found)}: --with exclude={nodes} starts them elsewhere"
            return Cause(kind, members, advice=words)
        case "diverged":  # its steps are the same ones again
            advice = "another --lr is another run; --new-code, if you have changed the model"
            return Cause(kind, members, (NEW_CODE,), advice)
    return Cause(kind, members)


def _fewer_at_once(members: Sequence[Member]) -> str:
    """What gives runs more of a job's memory that have shared one; empty if none has."""
    slots = 1
    for run in (member.run for member in members):
        newest = run.newest_job()
        if newest and newest.pack:
            with contextlib.suppress(ConfigError):  # its folder is gone: nobody knows how many
                slots = max(slots, Pack(run.study, newest.pack).slots)
    return f"{RUNS_PER_GPU}={slots // 2}" if slots > 1 else ""


def _nodes_of(run: Run) -> set[str]:
    """The nodes on which a run found no GPU since its user started it."""
    *before, newest = run.status().attempts
    found = {failed_node(run, newest.job)}
    if newest.job.started_by_user:
        return found
    for attempt in reversed(before):
        if attempt.kind == newest.kind:
            found.add(attempt.job.host)
        if attempt.job.started_by_user:
            break
    return found


def _limit_gb(member: Member) -> float | None:
    found = OF_MEMORY.search(member.run.status().reason)
    return float(found[1]) if found else None


def _next_size(gb: float) -> float:
    """The next power of two, of what clusters sell memory in."""
    return 2.0 ** (math.floor(math.log2(gb)) + 1)


def changes_from(given: Sequence[str]) -> dict[str, Any]:
    """The options that `--with` gives, by field, as the config holds them.

    Raises:
        ConfigError: One is no option of the cluster or of restarts, or changes the result.
    """
    hints = {**get_type_hints(SlurmConfig), **get_type_hints(RestartConfig), RUNS_PER_GPU: int}
    known = hints.keys() - {*RANKS, "sbatch"}
    found = {}
    for item in given:
        key, value = key_value("--with", item)
        name = key.replace("-", "_")
        if name in RANKS:
            raise ConfigError(
                f"--with {key}: the number of ranks decides the bits of a step; a run on another "
                "number is another run: submit it under another --name"
            )
        if name not in known:
            raise ConfigError(
                f"--with: found {key}, expected options of the cluster (mem_gb=64 "
                f"timeout_min=240); {meant(name, known, 'of them')}"
            )
        is_text = str in (hints[name], *get_args(hints[name]))
        if is_text and not isinstance(value, str | None):
            value = item.partition("=")[2]  # an account may be called 007, or 1e5
        try:
            found[name] = typed_value(name, value, hints[name], Path())
        except TypeError as error:
            raise ConfigError(f"--with {key}: found {error}") from error
    return found


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The config of a run with other options of the cluster, or of restarts."""
    slurm = {key: value for key, value in changes.items() if hasattr(config.slurm, key)}
    restarts = {key: value for key, value in changes.items() if hasattr(config.restarts, key)}
    # An option of sbatch for the same would win.
    lost = [option for option, name in FIELDS_OF_OPTIONS.items() if name in slurm]
    kept = {key: value for key, value in config.slurm.sbatch.items() if key not in lost}
    return replace(
        config,
        slurm=replace(config.slurm, **{"sbatch": KeyValues(kept), **slurm}),
        restarts=replace(config.restarts, **restarts),
    )
