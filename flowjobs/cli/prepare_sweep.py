"""From a sweep to its runs: checks everything that can be checked without torch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.prepare import (
    check_parts,
    note_study_above,
    warn_of_missing_imports,
    with_absolute_paths,
)
from flowjobs.config import KEPT_UNLESS_GIVEN, SIZE_FIELDS, RunConfig, TrainingConfig
from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.field_values import flag
from flowjobs.formatting import counted
from flowjobs.models.size import with_fixed_width
from flowjobs.runs.datasets import row_shape
from flowjobs.runs.pack import check_shared
from flowjobs.runs.run import Run, check_run_name
from flowjobs.runs.selection import ARGUMENT, runs_of_sweep
from flowjobs.sweeps.applying import applying
from flowjobs.sweeps.grid import TABLES, Point, Sweep, run_names_of, slurm_of, training_of
from flowjobs.sweeps.saved import names_of_runs, read_saved
from flowjobs.training.pinned import with_pinned_files


def prepare_sweep(
    defaults: Defaults, study: Path, name: str, sweep: Sweep
) -> tuple[dict[Run, RunConfig], frozenset[str]]:
    """The runs of a sweep, and the config of each. Writes nothing; prints what is left out.

    Args:
        defaults: For the values that the sweep does not have, and the user's names of models.
        study: Root of the study, absolute.
        name: Name of the sweep.
        sweep: What was asked for.

    Returns:
        The runs; and of KEPT_UNLESS_GIVEN those that are asked for of any.

    Raises:
        FlowjobsError: Something in it cannot be used.
    """
    parts = {
        part: dataclasses.replace(defaults.fill(cls), **getattr(sweep, part))
        for part, cls in TABLES.items()
    }
    points, configs, left_out_of = _asked_of(sweep, defaults, name)
    if not points:
        raise ConfigError(f"the sweep {name} has no runs: all are excluded")
    if unused := sweep.unused_exclusions():
        print(f"note: [[exclude]] {', '.join(unused)} matches no run")
    for varied, n in left_out_of.items():
        option = flag(varied.removeprefix(ARGUMENT))
        print(f"note: {option} does not apply to {counted(n)} and is left out there")
    _check_each(configs, study, defaults)
    names = run_names_of(configs)
    shapes = {data: row_shape(data, study) for data in {c.dataset for c in configs if c.params}}
    configs = [with_fixed_width(c, shapes.get(c.dataset)) for c in configs]
    names = names_of_runs(study, name, configs, names)
    if name in names:
        raise ConfigError(f"the sweep's name: found {name}, one of its runs; give another")
    runs: dict[Run, RunConfig] = {}
    for point, config, run_name in zip(points, configs, names, strict=True):
        check_run_name(run_name)
        run, training = Run(study, run_name), config
        if training.init_from is not None or training.reflow_from is not None:
            training = with_pinned_files(training, study, _training_of(run))
        slurm = slurm_of(point, parts["slurm"])
        defaults.check_sbatch(slurm)
        check_shared(sweep.runs_per_gpu, slurm)
        if slurm.mps and sweep.runs_per_gpu == 1:
            raise ConfigError("--mps: expected --runs-per-gpu 2 or more, which share a GPU")
        runs[run] = RunConfig(training, slurm, parts["tracking"], parts["restarts"])
    for config in configs:
        parts["tracking"].check_asked(config.group)
    warn_of_missing_imports(configs)
    note_study_above(study)
    given = {*KEPT_UNLESS_GIVEN} & {field for point in points for field in point}
    return runs, frozenset(given)


def configs_kept(defaults: Defaults, study: Path, name: str) -> dict[str, TrainingConfig]:
    """What a sweep that the study keeps means, by the names that new runs of it would get.

    What it does not say itself is as one of its runs has it: defaults may have changed since.

    Raises:
        FlowjobsError: Its file was changed into one that cannot be used.
    """
    points, configs, _ = _asked_of(read_saved(study, name), defaults, name)
    if not configs:
        return {}
    given = {"arch_args", *SIZE_FIELDS, *(field for point in points for field in point)}
    made = (_training_of(Run(study, of)) for of in runs_of_sweep(study, name))
    if like := next(filter(None, made), None):
        others = [of.name for of in dataclasses.fields(like) if of.name not in given]
        same = {field: getattr(like, field) for field in others}
        configs = [dataclasses.replace(config, **same) for config in configs]
    return dict(zip(run_names_of(configs), configs, strict=True))


def _training_of(run: Run) -> TrainingConfig | None:
    """The config on disk; None where there is none, or it cannot be read, which `look_at` says."""
    try:
        return run.config().training if run.exists() else None
    except (FlowjobsError, OSError):
        return None


def _asked_of(
    sweep: Sweep, defaults: Defaults, name: str
) -> tuple[list[Point], list[TrainingConfig], dict[str, int]]:
    """The runs of a sweep as the values that are given and as configs; see `applying`."""
    base = defaults.resolve_arch(defaults.fill(TrainingConfig))
    if "group" not in defaults.values:
        base = dataclasses.replace(base, group=name)
    points = sweep.points()
    for point in points:
        if "arch" in point:
            point["arch"] = defaults.arch_named(point["arch"])
    points, left_out_of = applying(points, base)
    configs = [with_absolute_paths(training_of(point, base)) for point in points]
    return points, configs, left_out_of


def _check_each(configs: Sequence[TrainingConfig], study: Path, defaults: Defaults) -> None:
    """Raise if a run has bad input; of runs that differ in numbers alone one is checked."""
    different: dict[tuple[object, ...], TrainingConfig] = {}
    for config in configs:
        names = (config.arch, config.flow, config.dataset, config.source, config.reflow_from)
        numbers = (config.model_args, config.params, config.sigma == 0, config.ot_batch)
        times = (config.time_sampling, config.time_mean, config.time_std)
        added = (config.aug, config.aug_strength is None)
        different.setdefault((*names, *times, *added, *map(str, numbers)), config)
    for config in different.values():
        check_parts(config, study, defaults)
