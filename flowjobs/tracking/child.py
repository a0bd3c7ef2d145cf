"""Processes of their own for what loads wandb: how they are called, and with what around them."""

import os
import sys
from pathlib import Path

import flowjobs

# Arguments say these; in the environment they are another run's, or another process's.
LEFT_OUT = (
    "WANDB_SERVICE",
    "WANDB_MODE",
    "WANDB_RUN_ID",
    "WANDB_RESUME",
    "WANDB_NAME",
    "WANDB_NOTES",
    "WANDB_TAGS",
    "WANDB_RUN_GROUP",
    "WANDB_SILENT",
)


def module_command(module: str) -> list[str]:
    """What runs a module of this package in the Python of this process."""
    # -P: a file wandb.py beside the user's code is not wandb.
    return [sys.executable, "-P", "-m", module]


def child_environment() -> dict[str, str]:
    """This process's environment, without what would lead wandb to another run."""
    package_root = str(Path(flowjobs.__file__).parent.parent)
    python_path = filter(None, [package_root, os.environ.get("PYTHONPATH")])
    return {
        **{name: value for name, value in os.environ.items() if name not in LEFT_OUT},
        "PYTHONPATH": os.pathsep.join(python_path),
        # wandb loads NumPy, whose threads would spin on the cores that train.
        "OPENBLAS_NUM_THREADS": "1",
        # Nor those of wandb-core: that many at a time, and idle ones look for work before they
        # sleep, a third of all that it takes.
        "GOMAXPROCS": "1",
    }
