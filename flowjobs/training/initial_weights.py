"""`--init-from`: the weights that a run starts with, known by the digest of their file.

Loads no torch, so that `submit` can look a file up.
"""

from dataclasses import replace
from pathlib import Path

from flowjobs.config import PINNED, TrainingConfig
from flowjobs.errors import CheckpointError, CheckpointMismatchError, ConfigError
from flowjobs.training.seal import digest_of


def with_pinned_weights(config: TrainingConfig, before: TrainingConfig | None) -> TrainingConfig:
    """The config with the path in `init_from` made absolute, and the file's digest behind it.

    Args:
        config: What is asked for.
        before: The config of the run on disk that it may be, whose weights are taken over by now:
            its file may be gone.

    Raises:
        ConfigError: There is no such file, or it is no checkpoint.
    """
    if config.init_from is None or PINNED in config.init_from:
        return config
    path = Path(config.init_from).expanduser().absolute()
    taken_over = before is not None and (before.init_from or "").rpartition(PINNED)[0] == str(path)
    if taken_over and before is not None and not path.exists():
        return replace(config, init_from=before.init_from)
    try:
        return replace(config, init_from=f"{path}{PINNED}{digest_of(path)}")
    except (OSError, CheckpointError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is no checkpoint of flowjobs"
        raise ConfigError(f"--init-from {path}: {what}; expected a best.pt or last.pt") from error


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
