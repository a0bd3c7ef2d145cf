"""Where a run of a report comes from: the command that makes it again, its code, its W&B page."""

import shlex
from typing import Any

from flowjobs.config import PINNED, differences_from_defaults
from flowjobs.errors import FlowjobsError
from flowjobs.field_values import flag, literal_or_text
from flowjobs.runs.code import code_of
from flowjobs.runs.run import Run
from flowjobs.runs.surroundings import surroundings_of


def command_of(run: Run) -> str:
    """The command line that submits the run again, as its config says, to be typed in a shell.

    Raises:
        ConfigError: The config is damaged.
    """
    config = run.config()
    words = ["flowjobs", "submit"]
    for name, value in differences_from_defaults(config).items():
        words += _words(name, value)
    if run.name != config.training.run_name:
        words += ["--name", run.name]
    return shlex.join(words)


def commit_of(run: Run) -> str:
    """The commit of the user's code, and whether it was changed; empty if nothing is known."""
    try:
        code = code_of(run)
    except FlowjobsError:
        code = None
    commit, dirty = (code.git_commit, code.git_dirty) if code else (None, None)
    if code is None:
        found = surroundings_of(run)
        commit, dirty = found.get("git_commit"), found.get("git_dirty")
    snapshot = f"code {code.digest}" if code else ""
    if not commit:
        return snapshot
    return f"{str(commit)[:12]}{' with changes' if dirty else ''}{f', {snapshot}' if code else ''}"


def wandb_page_of(run: Run) -> str:
    """The address of the run's page in W&B; empty where no server has been told of it."""
    try:
        found = run.wandb_page_file.read_text(errors="replace").strip()
    except OSError:
        return ""
    return found if found.startswith(("https://", "http://")) else ""


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{flag(name)[2:]}"]
    if isinstance(value, dict):
        return [flag(name), *(f"{key}={_literal(given)}" for key, given in value.items())]
    if name in ("init_from", "reflow_from"):
        value = str(value).partition(PINNED)[0]
    return [flag(name), str(value)]


def _literal(value: Any) -> str:
    """A value that `KeyValues.parse` reads back."""
    return value if isinstance(value, str) and literal_or_text(value) == value else repr(value)
