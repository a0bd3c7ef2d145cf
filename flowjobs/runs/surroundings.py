"""With what code and where a run's newest attempt trains: noted on that machine, read on any."""

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

from flowjobs import __version__
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.run import Run

# A repository on a slow file system must not keep the first row.
COMMAND_TIMEOUT_S = 10


def note_surroundings(run: Run, directory: Path | None) -> None:
    """Note with what code and where the run trains: on this machine.

    Whoever tells W&B of the run later, from another machine, finds it in the run's folder.

    Args:
        run: The run.
        directory: The working directory of the user, for its git commit; None if it is gone.
    """
    commit, dirty = git_commit(directory) if directory else (None, None)
    found = {
        "git_commit": commit,
        "git_dirty": dirty,
        "flowjobs_version": __version__,
        "torch_version": _version("torch"),
        "python_version": platform.python_version(),
        "host": socket.gethostname(),
        "gpus": gpu_names(),
    }
    run.wandb_folder.mkdir(exist_ok=True)
    write_json(run.surroundings_file, found, flush=False)


def surroundings_of(run: Run) -> dict[str, Any]:
    """With what code and where the newest attempt trained; empty if that was never noted."""
    try:
        return read_json(run.surroundings_file)
    except (OSError, ValueError):
        return {}  # it never came so far


def git_commit(directory: Path) -> tuple[str | None, bool | None]:
    """The commit that is checked out in `directory`, and whether a tracked file differs from it.

    Both are None without git or outside a repository.
    """
    git = ("git", "-C", str(directory))
    commit = _output(*git, "rev-parse", "HEAD").strip()
    if not commit:
        return None, None
    return commit, bool(_output(*git, "status", "--porcelain", "--untracked-files=no"))


def gpu_names() -> list[str]:
    """The names of the GPUs that this process may use; none without NVIDIA's driver."""
    found = re.findall(
        r"^GPU (\d+): (.+) \(UUID: (.+)\)$", _output("nvidia-smi", "-L"), flags=re.MULTILINE
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [name for _, name, _ in found]
    asked = visible.split(",")
    return [name for index, name, uuid in found if index in asked or uuid in asked]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # a file's name is any bytes
            check=False,
            timeout=COMMAND_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
