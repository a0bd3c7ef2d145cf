"""What a run's config in W&B holds beside its own: what an ablation needs to be reproduced."""

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowjobs import __version__
from flowjobs.runs.run import Run

# A repository on a slow file system must not keep the first row.
COMMAND_TIMEOUT_S = 10


@dataclass(frozen=True)
class Commit:
    """The commit of a working directory, and whether a tracked file differs from it."""

    sha: str
    dirty: bool


def config_for_wandb(run: Run, directory: Path, *, trains_here: bool = True) -> dict[str, Any]:
    """The run's training config, and where and with what each attempt ran.

    Args:
        run: The run.
        directory: The working directory of the user, for its git commit.
        trains_here: Whether this process's machine is the one that trains; else what W&B has of
            the machine and the code is left as it is.
    """
    config = run.config().training
    status = run.status()
    attempts = status.attempts if status else []
    found = {
        **config.to_dict(),
        "signature": config.signature,
        "run_folder": str(run.folder),
        "attempts": [
            {
                "attempt": attempt.number,
                "cluster": attempt.job.cluster,
                "job_id": attempt.job.job_id,
                "host": attempt.job.host,
            }
            for attempt in attempts
        ],
    }
    if not trains_here:
        return found
    commit = git_commit(directory)
    return found | {
        "git_commit": commit.sha if commit else None,
        "git_dirty": commit.dirty if commit else None,
        "flowjobs_version": __version__,
        "torch_version": _version("torch"),
        "python_version": platform.python_version(),
        "host": socket.gethostname(),
        "gpus": gpu_names(),
    }


def git_commit(directory: Path) -> Commit | None:
    """The commit that is checked out in `directory`; None without git or outside a repository."""
    sha = _output("git", "-C", str(directory), "rev-parse", "HEAD")
    if not sha:
        return None
    changed = _output("git", "-C", str(directory), "status", "--porcelain", "--untracked-files=no")
    return Commit(sha.strip(), bool(changed))


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
            check=False,
            timeout=COMMAND_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
