"""The process that mirrors a run to W&B: how it is started, with what environment, how it ends.

Loads no wandb.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import flowjobs
from flowjobs.runs.run import Run
from flowjobs.tracking.mode import CREDENTIALS, is_here, settings_of_user
from flowjobs.tracking.record import Session

# What a mirror is for: to follow a training, to report how an attempt ended that could not do it
# itself, or to bring the server up to date with what was tracked elsewhere.
Role = Literal["follow", "close", "sync"]

# All that wandb may know of WANDB_* variables and of its settings files: what it takes to reach the
# server and to be let in. Any other is the run's own, and told by arguments, or another run's: a
# sweep's id, a fork, a team, a folder.
SERVER_SETTINGS = [
    "api_key",
    "app_url",
    "base_url",
    "cache_dir",
    "credentials_file",
    "data_dir",
    "error_reporting",
    "https_proxy",
    "http_proxy",
    "http_timeout",
    "identity_token_file",
    "insecure_disable_ssl",
    "x_extra_http_headers",
    "_extra_http_headers",
    "_proxies",
]

# Variables that hold a path, which may be relative to the directory that the mirror leaves.
PATHS = re.compile(
    "WANDB_.*_(DIR|FILE)|NETRC|SSL_CERT_(DIR|FILE)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
)

# Slurm signals every process of a job; the mirror is to end when the training has said its last.
SIGNALS_FOR_TRAINING_ALONE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}

# How long W&B may take for what it lacks of a run; a burst of rows takes a fiftieth of that.
UPLOAD_BASE_S, UPLOAD_BYTES_PER_S = 60.0, 20_000


def upload_limit_s(run: Run) -> float:
    """The longest that it may take to tell W&B all of a run, in seconds."""
    size = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
    return UPLOAD_BASE_S + size / UPLOAD_BYTES_PER_S


def start_mirror(run: Run, session: Session, role: Role) -> subprocess.Popen[bytes]:
    """Start the process that mirrors a session, which is the one in the run's folder.

    Beside a training it waits for commands on its standard input; otherwise it tells W&B the state
    of the run, and ends.

    Raises:
        OSError: It could not be started.
    """
    log = run.folder / "wandb" / "mirror.log"
    log.parent.mkdir(exist_ok=True)
    pipe = subprocess.DEVNULL if role == "close" else subprocess.PIPE
    # -P: a file wandb.py beside the user's code is not wandb.
    command = [sys.executable, "-P", "-m", "flowjobs.tracking.mirror"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_FOR_TRAINING_ALONE)
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                [*command, run.folder, session.token, str(os.getpid()), role],
                stdin=pipe,
                stdout=pipe,
                stderr=output,
                env=mirror_environment(
                    "online" if role == "sync" else session.mode,
                    run.config().tracking.wandb_base_url,
                ),
                start_new_session=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def mirror_environment(mode: str, server: str | None = None) -> dict[str, str]:
    """The environment of a mirror: this process's, without what could lead wandb to another run.

    Args:
        mode: "online" or "offline".
        server: That of the run; None if it has noted none.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lstrip("_").startswith("WANDB")
    }
    settings = settings_of_user()
    for setting in SERVER_SETTINGS:
        name = f"WANDB_{setting.upper()}"
        # A key out of a file ends with its newline, which wandb refuses; an empty one is none.
        if value := os.environ.get(name, "").strip() or settings.get(setting, "").strip():
            kept[name] = value
    if server:
        if not is_here(server):  # a key here is another's
            for name in ("WANDB_APP_URL", *CREDENTIALS):
                kept.pop(name, None)
        kept["WANDB_BASE_URL"] = server
    for name, value in kept.items():
        if value and PATHS.fullmatch(name):
            kept[name] = os.path.abspath(os.path.expanduser(value))
    package_root = str(Path(flowjobs.__file__).parent.parent)
    python_path = filter(None, [package_root, os.environ.get("PYTHONPATH")])
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(python_path),
        # wandb loads NumPy, whose threads would spin on the cores that train.
        "OPENBLAS_NUM_THREADS": "1",
        # Nor those of wandb-core: that many at a time, and idle ones look for work before they
        # sleep, a third of all that it takes.
        "GOMAXPROCS": "1",
        # wandb's telemetry goes by this and not by `init(mode=…)`: offline, it would take a third
        # of each row's time for nothing.
        "WANDB_MODE": mode,
        # No settings file: any other key in it would lead elsewhere, too. That of the working
        # directory the mirror leaves behind.
        "WANDB_CONFIG_DIR": os.devnull,
        "WANDB_SAGEMAKER_DISABLE": "true",  # which has ids of its own
    }
