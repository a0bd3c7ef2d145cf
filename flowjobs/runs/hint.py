"""Command lines to print for the user: they work as they stand, in the working directory."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from flowjobs.errors import ConfigError
from flowjobs.runs.run import absolute, default_study
from flowjobs.user_code import shown_path
from flowjobs.working_folder import working_folder


def hint(command: str, *words: str, study: Path | None = None) -> str:
    """A command line of flowjobs, for a shell in the working directory.

    Args:
        command: The command (`status`).
        words: What follows it.
        study: The study that it is about; named unless it is the default one.
    """
    if study is not None and absolute(study) != _default_here():
        shown = _from_here(study)
        words = (*words, "--study", f"./{shown}" if shown.startswith("-") else shown)
    return shlex.join([*_flowjobs(), command, *words])


def program(name: str) -> str:
    """How a program of this environment is called from a shell here (`wandb`)."""
    return shlex.join(_called(name, Path(sys.executable).with_name(name)))


def _default_here() -> Path | None:
    """The default study; None where the working directory is gone, or called as none can be."""
    try:
        return absolute(default_study())
    except (ConfigError, OSError):
        return None


def _flowjobs() -> list[str]:
    """How this flowjobs is called from here."""
    script = Path(sys.argv[0])
    if not (script.name == "flowjobs" and script.is_file()):  # started as python -m flowjobs
        script = Path(sys.executable).with_name("flowjobs")
    return _called("flowjobs", script)


def _called(name: str, script: Path) -> list[str]:
    """How a program is called from here: the environment need not be activated."""
    on_path = shutil.which(name)
    if on_path and script.is_file() and os.path.samefile(on_path, script):
        return [name]
    if os.access(script, os.X_OK):
        return [_path_to(script)]
    return [_path_to(Path(sys.executable)), "-m", name]


def _path_to(path: Path) -> str:
    shown = _from_here(path)
    return shown if "/" in shown else f"./{shown}"  # else a shell would look on PATH


def _from_here(path: Path) -> str:
    """The path, relative where it lies below the working directory."""
    return str(shown_path((working_folder() or Path()) / path))
