"""The checkpoints of other runs that a run begins with, known by the digest of their file.

`--init-from` takes weights, `--reflow-from` the pairs of noise and sample. Loads no torch, so that
`submit` can look the files up.
"""

from dataclasses import replace
from pathlib import Path

from flowjobs.config import PINNED, TrainingConfig
from flowjobs.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    RunNotFoundError,
)
from flowjobs.runs.run import Run
from flowjobs.training.seal import digest_of


def with_pinned_files(
    config: TrainingConfig, study: Path, before: TrainingConfig | None
) -> TrainingConfig:
    """The config with a digest behind `init_from`, whose path is made absolute, and `reflow_from`.

    Args:
        config: What is asked for.
        study: Where the run of `reflow_from` is.
        before: The config of the run on disk that it may be, which has taken over what it needs by
            now: the files may be gone.

    Raises:
        ConfigError: There is no such file, or it is no checkpoint; or the other run is not
            finished, or starts its paths elsewhere.
    """
    if config.init_from is not None and PINNED not in config.init_from:
        path = Path(config.init_from).expanduser().absolute()
        kept = _kept(before.init_from if before else None, str(path), path)
        pinned = kept or _pinned("--init-from", str(path), path)
        config = replace(config, init_from=pinned)
    if config.reflow_from is not None and PINNED not in config.reflow_from:
        run = Run(study, config.reflow_from)
        kept = _kept(before.reflow_from if before else None, run.name, run.best)
        if kept is None:
            _check_teacher(run, config)
        pinned = kept or _pinned("--reflow-from", run.name, run.best)
        config = replace(config, reflow_from=pinned)
    return config


def _kept(before: str | None, name: str, path: Path) -> str | None:
    """What the run on disk has, if it names the same and that is gone."""
    same = before is not None and before.rpartition(PINNED)[0] == name
    return before if same and not path.exists() else None


def _pinned(option: str, name: str, path: Path) -> str:
    try:
        return f"{name}{PINNED}{digest_of(path)}"
    except (OSError, CheckpointError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is no checkpoint of flowjobs"
        raise ConfigError(f"{option} {path}: {what}; expected a best.pt or last.pt") from error


def _check_teacher(run: Run, config: TrainingConfig) -> None:
    try:
        theirs = run.config().training
    except RunNotFoundError as error:
        raise ConfigError(f"--reflow-from: {error}") from error
    if not run.finished():
        raise ConfigError(
            f"--reflow-from {run.name}: found a run that is not finished, expected one that is: "
            f"flowjobs resume {run.name}"
        )
    for option in ("source", "normalize"):
        there, here = getattr(theirs, option), getattr(config, option)
        if there != here:
            raise ConfigError(f"--{option}: found {here}, expected {there}, as {run.name} has it")


def initial_weights_file(config: TrainingConfig) -> Path | None:
    """The file that `init_from` means; None where the run starts from random weights.

    Raises:
        CheckpointError: It is gone, or no checkpoint.
        CheckpointMismatchError: It is another file than when the run was made.
    """
    if config.init_from is None:
        return None
    name, _, digest = config.init_from.rpartition(PINNED)
    path = Path(name)
    try:
        found = digest_of(path)
    except OSError as error:
        raise CheckpointError(f"--init-from {path} cannot be read: {error.strerror}") from error
    if found != digest:
        raise CheckpointMismatchError(
            f"--init-from {path} is another file than when the run was made: found the digest "
            f"{found[:16]}, expected {digest[:16]}; restore it, or give the run another --name"
        )
    return path
