"""Processes of their own for what loads wandb: how they are called, and with what around them."""

import os
import sys
from pathlib import Path

import flowjobs

# All that wandb may know of WANDB_*: what it takes to reach the server and to be let in. Any other
# is the run's own, and told by arguments, or another run's: a sweep's id, a fork, a folder.
WANDB_VARIABLES = (
    "WANDB_API_KEY",
    "WANDB_APP_URL",
    "WANDB_BASE_URL",
    "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR",
    "WANDB_CREDENTIALS_FILE",
    "WANDB_DATA_DIR",
    "WANDB_ERROR_REPORTING",
    "WANDB_HTTPS_PROXY",
    "WANDB_HTTP_PROXY",
    "WANDB_HTTP_TIMEOUT",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_INSECURE_DISABLE_SSL",
    "WANDB_X_EXTRA_HTTP_HEADERS",
    "WANDB__EXTRA_HTTP_HEADERS",
    "WANDB__PROXIES",
)


def module_command(module: str) -> list[str]:
    """What runs a module of this package in the Python of this process."""
    # -P: a file wandb.py beside the user's code is not wandb.
    return [sys.executable, "-P", "-m", module]


def child_environment() -> dict[str, str]:
    """This process's environment, without what could lead wandb to another run."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in WANDB_VARIABLES or not name.lstrip("_").startswith("WANDB")
    }
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
    }
