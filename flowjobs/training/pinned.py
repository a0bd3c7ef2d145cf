"""The checkpoints of other runs that a run begins with, known by the digest of their file.

`--init-from` takes weights, `--reflow-from` the pairs of noise and sample. Loads no torch, so that
`submit` can look the files up.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flowjobs.config import PINNED, TrainingConfig
from flowjobs.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    RunNotFoundError,
)
from flowjobs.runs.data_file import DataContent
from flowjobs.runs.datasets import PAIRS, content_of_data, differences
from flowjobs.runs.hint import hint
from flowjobs.runs.run import Run
from flowjobs.training.seal import digest_of


def with_pinned_files(
    config: TrainingConfig,
    study: Path,
    before: TrainingConfig | None,
    *,
    data_are_given: bool = False,
) -> TrainingConfig:
    """The config with a digest behind `init_from`, whose path is made absolute, and `reflow_from`.

    Args:
        config: What is asked for.
        study: Where the run of `reflow_from` is.
        before: The config of the run on disk that it may be, which has taken over what it needs by
            now: the files may be gone.
        data_are_given: The run's data are not those that the config names: they are compared with
            the other run's where its pairs are taken.

    Raises:
        ConfigError: There is no such file, or it is no checkpoint; or the other run is not
            finished, starts its paths elsewhere, or is of other data.
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
            if not data_are_given:
                _check_files_of(run, config)
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
            f"`{hint('resume', run.name, study=run.study)}`"
        )
    for option in ("source", "normalize"):
        there, here = getattr(theirs, option), getattr(config, option)
        if there != here:
            raise ConfigError(f"--{option}: found {here}, expected {there}, as {run.name} has it")


def _check_files_of(teacher: Run, config: TrainingConfig) -> None:
    theirs = teacher.config().training
    if now := content_of_data(replace(config, reflow_from=None), teacher.study):
        check_same_data(teacher, now)
        return
    # An embedded set that is not made yet, of which no two are the same. If the other run's data
    # are what its config names (a notebook's may not be), other names are other data.
    files = content_of_data(replace(theirs, reflow_from=None), teacher.study)
    noted = _data_of(teacher)
    if theirs.dataset != config.dataset and noted and not differences(noted, files):
        raise ConfigError(
            f"--dataset: found {config.dataset}, expected {theirs.dataset}, as {teacher.name} "
            "has it"
        )


def check_same_data(teacher: Run, content: Mapping[str, DataContent | None]) -> None:
    """Raise unless the run of `--reflow-from` was trained on these data.

    Args:
        teacher: The run.
        content: By part; None of one that is not known.

    Raises:
        ConfigError: It was trained on others; the text says what differs.
    """
    if lines := differences(_data_of(teacher), content):
        raise ConfigError(
            f"--reflow-from {teacher.name}: it was trained on other data, expected those of this "
            "run:\n" + "\n".join(lines)
        )


def _data_of(teacher: Run) -> dict[str, DataContent]:
    """What was noted of them, without the pairs that it may have been trained on itself."""
    return {part: of for part, of in teacher.data().items() if not part.startswith(PAIRS)}


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
