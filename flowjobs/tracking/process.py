"""The process that mirrors a run to W&B: started, waited for, and started for an attempt that died.

Loads no wandb.
"""

import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

import flowjobs
from flowjobs.runs.hint import hint
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome
from flowjobs.tracking import record
from flowjobs.tracking.mode import (
    CREDENTIALS,
    MORE_CREDENTIALS,
    has_login,
    is_here,
    resolve_mode,
    server_of,
    variables,
)

logger = logging.getLogger(__name__)

# What a mirror is for: to log what a training writes, to report how an attempt ended that could not
# do so itself, or to bring the server up to date with what was tracked elsewhere.
Role = Literal["train", "report", "sync"]

# All that wandb may know of WANDB_* variables and of its settings files: what it takes to reach the
# server and to be let in. Any other is the run's own, and told by arguments, or another run's: a
# sweep's id, a fork, a team, a folder.
SERVER_VARIABLES = re.compile(
    "WANDB_(API_KEY|APP_URL|BASE_URL|CACHE_DIR|CREDENTIALS_FILE|DATA_DIR|ERROR_REPORTING"
    "|HTTPS?_PROXY|HTTP_TIMEOUT|IDENTITY_TOKEN_FILE|INIT_TIMEOUT|INSECURE_DISABLE_SSL|USERNAME"
    "|USER_EMAIL|X?_EXTRA_HTTP_HEADERS|X?_SERVICE_WAIT|_PROXIES)"
)
# Variables that hold a path, which may be relative to the directory that the mirror leaves.
PATHS = re.compile(
    "WANDB_.*_(DIR|FILE)|NETRC|SSL_CERT_(DIR|FILE)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
)

# How a mirror ends that W&B has not let tell all.
EXIT_NOT_TOLD = 3

# Slurm signals every process of a job; the mirror is to end when the training has said its last.
# wandb's own process dies of TERM all the same: see Mirror._finish, which opens another one.
SIGNALS_FOR_TRAINING_ALONE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}

# How long W&B may take for what it lacks of a run; a burst of rows takes a fiftieth of that.
UPLOAD_BASE_S, UPLOAD_BYTES_PER_S = 60.0, 20_000


def upload_limit_s(run: Run) -> float:
    """The longest that it may take to tell W&B all of a run, in seconds."""
    size = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
    longer_s = 0.0
    with suppress(ValueError):  # wandb says so
        longer_s = float(variables().get("WANDB_INIT_TIMEOUT", "0"))
    return UPLOAD_BASE_S + longer_s + size / UPLOAD_BYTES_PER_S


def failure_of_mirror(run: Run, code: int) -> str:
    """Why a mirror ended by itself, as where wandb cannot be loaded; "" for any other end."""
    if code in (0, EXIT_NOT_TOLD, -signal.SIGKILL):
        return ""
    said = run.mirror_log.read_text(errors="replace")
    # An error's text may have several lines.
    errors = re.findall(r"^[\w.]+Error\b.*", said, re.MULTILINE)
    why = errors[-1] if code == 1 and errors else f"exit code {code}"
    return f"the process that tells W&B has failed: {why} (see {run.mirror_log})"


def start_mirror(run: Run, session: record.Session, role: Role) -> subprocess.Popen[bytes]:
    """Start the process that mirrors a session, which is the one in the run's folder.

    Beside a training it waits for commands on its standard input; otherwise it tells W&B the state
    of the run, and ends.

    Raises:
        OSError: It could not be started.
    """
    run.wandb_folder.mkdir(exist_ok=True)
    pipe = subprocess.DEVNULL if role == "report" else subprocess.PIPE
    # -P: a file wandb.py beside the user's code is not wandb.
    command = [sys.executable, "-P", "-m", "flowjobs.tracking.mirror"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_FOR_TRAINING_ALONE)
    try:
        with run.mirror_log.open("ab") as output:
            return subprocess.Popen(
                [*command, run.folder, session.token, str(os.getpid()), role],
                stdin=pipe,
                stdout=pipe,
                stderr=output,
                env=mirror_environment(
                    "online" if role == "sync" else session.mode,
                    record.tracking_of(run).wandb_base_url,
                ),
                start_new_session=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for_mirror(
    run: Run, session: record.Session, mirror: subprocess.Popen[bytes], timeout_s: float
) -> None:
    """Wait until W&B knows how a session ended; end the mirror, and warn, if that takes longer."""
    try:
        code = mirror.wait(timeout_s)
    except subprocess.TimeoutExpired:
        mirror.kill()  # wandb's own process sees that and goes too
        code = mirror.wait()
    if mirror.stdin is not None:
        mirror.stdin.close()
    if code == 0 or record.is_superseded(run, session):
        return  # W&B knows, or a later session tells it
    refusal = record.read_uploaded(run).refusal
    why = refusal.text if refusal else failure_of_mirror(run, code)
    why = why or f"`{hint('sync', run.name, study=run.study)}` tries again"
    logger.warning("W&B does not know that %s is %s: %s", run.name, run.status().state, why)


def close_session(run: Run, *, wait: bool = True) -> bool:
    """Tell W&B how a run's newest attempt ended, as `status.json` has it, and all that it lacks.

    Takes about a second, or a minute where a server does not answer; never raises because of W&B.
    The caller holds the run's lock, or knows that no attempt is alive.

    Args:
        run: The run; one whose start failed gets a session in W&B that says so.
        wait: Return when W&B knows; else a process that outlives this one for a while tells it.

    Returns:
        Whether there was something to tell: W&B knows it now, or it is the `pending_outcome`.
    """
    if _unreported_outcome(run) is None:
        return False
    before = record.read_session(run)
    mode = before.mode if before else resolve_mode(record.tracking_of(run))[0]
    server = server_of(record.tracking_of(run))
    if mode == "online" and not has_login(server):
        # The server's own word would count for all who ask from elsewhere.
        logger.warning("W&B could not be told how %s ended: no login for %s", run.name, server)
        return True
    try:
        session = record.begin_session(run, mode)
        mirror = start_mirror(run, session, "report")
        if wait:
            wait_for_mirror(run, session, mirror, upload_limit_s(run))
    except OSError as error:
        logger.warning("W&B could not be told how %s ended: %s", run.name, error)
    return True


def pending_outcome(run: Run) -> Outcome | None:
    """What W&B is still to be told: `close_session` tells it.

    None where W&B refuses the run: `sync`, which its user asks for, tries again.
    """
    return None if record.read_uploaded(run).refusal else _unreported_outcome(run)


def _unreported_outcome(run: Run) -> Outcome | None:
    """How the run's newest attempt ended, if W&B is told of the run and does not know that."""
    tracking = record.tracking_of(run)
    mode, _ = resolve_mode(tracking)
    status = run.status()
    # A session is noted before a run trains: without one, WANDB_MODE kept W&B out there. Nor is it
    # told of a run without an attempt, which was cancelled before it began; nor, whatever the
    # WANDB_MODE of whoever asks, of one that was to be kept out.
    trained = any(attempt.first_step is not None for attempt in status.attempts)
    not_told = trained or not status.attempts or tracking.wandb_mode == "disabled"
    if mode == "disabled" or (not_told and record.read_session(run) is None):
        return None
    known, now = record.read_uploaded(run).reported, record.state_to_report(run)
    is_known = known and (known.attempts, known.outcome) == (now.attempts, now.outcome)
    return None if is_known else status.outcome


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
    kept |= {name: value for name, value in variables().items() if SERVER_VARIABLES.fullmatch(name)}
    if server:
        if not is_here(server):  # a key here is another's
            for name in ("WANDB_APP_URL", *CREDENTIALS, *MORE_CREDENTIALS):
                kept.pop(name, None)
        kept["WANDB_BASE_URL"] = server
    for name, value in kept.items():
        if value and PATHS.fullmatch(name):
            kept[name] = os.path.abspath(os.path.expanduser(value))
    package_root = str(Path(flowjobs.__file__).parent.parent)
    python_path = filter(None, [package_root, os.environ.get("PYTHONPATH")])
    return {
        "WANDB_INIT_TIMEOUT": "20",  # in seconds, for whom no variable of theirs says it
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
        # Nor a folder in /tmp for each run that `wandb.Api` is asked for.
        "WANDB_DIR": os.devnull,
        "WANDB_SAGEMAKER_DISABLE": "true",  # which has ids of its own
    }
