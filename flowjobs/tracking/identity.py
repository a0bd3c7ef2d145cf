"""What a run's config in W&B holds beside its own: what an ablation needs to be reproduced."""

import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

from flowjobs import __version__
from flowjobs.errors import ConfigError
from flowjobs.runs.code import code_of
from flowjobs.runs.files import write_json
from flowjobs.runs.run import Run

# A repository on a slow file system must not keep the first row.
COMMAND_TIMEOUT_S = 10
# Of a diff in a run's config; the whole is in the run's folder.
DIFF_LIMIT_BYTES = 20_000


def note_surroundings(run: Run, directory: Path) -> None:
    """Note with what code and where the run trains: on this machine.

    Whoever tells W&B of the run later, from another machine, finds it in the run's folder.

    Args:
        run: The run.
        directory: The working directory of the user, for its git commit.
    """
    commit, dirty = git_commit(directory)
    found = {
        "git_commit": commit,
        "git_dirty": dirty,
        "flowjobs_version": __version__,
        "torch_version": _version("torch"),
        "python_version": platform.python_version(),
        "host": socket.gethostname(),
        "gpus": gpu_names(),
    }
    file = _surroundings_file(run)
    file.parent.mkdir(exist_ok=True)
    write_json(file, found, flush=False)


def config_for_wandb(run: Run) -> dict[str, Any]:
    """The run's training config, its attempts, and the surroundings of the newest one."""
    config = run.config().training
    status = run.status()
    attempts = status.attempts if status else []
    return {
        **config.to_dict(),
        **surroundings_of(run),
        **_code(run),
        "signature": config.signature,
        "run_folder": str(run.folder),
        "extensions": status.extensions if status else [],
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


def _code(run: Run) -> dict[str, Any]:
    """What the run keeps of its code: known by that, not by what is checked out at an attempt."""
    try:
        code = code_of(run)
        if code is None:
            return {}
        with run.code_diff_file.open("rb") as file:
            diff = file.read(DIFF_LIMIT_BYTES + 1)
    except (ConfigError, OSError):
        return {}  # the attempt says so itself
    text = diff[:DIFF_LIMIT_BYTES].decode(errors="replace")
    cut = f"\n(cut: see {run.code_diff_file})" if len(diff) > DIFF_LIMIT_BYTES else ""
    return {
        "code": code.digest,
        "code_earlier": list(code.earlier),
        "git_commit": code.git_commit,
        "git_dirty": code.git_dirty,
        "git_diff": text + cut,
    }


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


def _surroundings_file(run: Run) -> Path:
    return run.folder / "wandb" / "surroundings.json"


def surroundings_of(run: Run) -> dict[str, Any]:
    """With what code and where the newest attempt trained; empty if that was never noted."""
    try:
        return dict(json.loads(_surroundings_file(run).read_text()))
    except (OSError, ValueError):
        return {}  # it never came so far


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
