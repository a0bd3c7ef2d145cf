"""Command lines to print for the user: they work as they stand, in the working directory."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from flowjobs.errors import ConfigError
from flowjobs.runs.run import absolute, default_study


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


def _default_here() -> Path | None:
    """The default study; None where the working directory is gone, or called as none can be."""
    try:
        return absolute(default_study())
    except (ConfigError, OSError):
        return None


def _flowjobs() -> list[str]:
    """How this flowjobs is called from here: the environment need not be activated."""
    script = Path(sys.argv[0])
    if not (script.name == "flowjobs" and script.is_file()):  # started as python -m flowjobs
        script = Path(sys.executable).with_name("flowjobs")
    on_path = shutil.which("flowjobs")
    if on_path and script.is_file() and os.path.samefile(on_path, script):
        return ["flowjobs"]
    if os.access(script, os.X_OK):
        return [_program(script)]
    return [_program(Path(sys.executable)), "-m", "flowjobs"]


def _program(path: Path) -> str:
    shown = _from_here(path)
    return shown if "/" in shown else f"./{shown}"  # else a shell would look on PATH


def _from_here(path: Path) -> str:
    """The path, relative where it lies below the working directory."""
    try:
        here, path = Path.cwd(), path.absolute()
    except OSError:  # the working directory is gone
        return str(path)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
