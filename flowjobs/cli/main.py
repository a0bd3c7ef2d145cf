"""Parses the command line, runs the command, turns errors into words and exit codes."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from flowjobs.cli.data import Data
from flowjobs.cli.defaults import Defaults, load_defaults
from flowjobs.cli.logs import Logs
from flowjobs.cli.status import Status
from flowjobs.cli.submit import Submit
from flowjobs.cli.train import Train
from flowjobs.errors import FlowjobsError, RunInterrupted
from flowjobs.runs.status import EXIT_INTERRUPTED_BY_KEYBOARD, EXIT_PREEMPTED

DESCRIPTION = """Flow-matching ablations on a preemptible Slurm cluster, or on this machine."""

EPILOG = """
Exit codes: 0 done; 1 the run failed; 2 bad input, nothing was done; 75 preempted, the same
command goes on; 130 Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `flowjobs` and `python -m flowjobs`. Always exits."""
    # A user's own model is looked up from here, also by the console script.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        sys.exit(run(sys.argv[1:] if arguments is None else arguments))
    except FlowjobsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except RunInterrupted as interrupted:
        print(f"{interrupted}; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED_BY_KEYBOARD)
    except BrokenPipeError:
        # `flowjobs logs RUN | head`: nothing is left to tell anyone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command. Returns its exit code."""
    defaults = load_defaults()
    command: Any = tyro.cli(
        _commands(defaults),
        prog="flowjobs",
        description=DESCRIPTION + EPILOG,
        args=arguments,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.DisallowNone,
        ),
    )
    code: int = command.run(defaults)
    return code


def _commands(defaults: Defaults) -> Any:
    submit = tyro.conf.subcommand("submit", default=defaults.fill(Submit))
    train = tyro.conf.subcommand("train", default=defaults.fill(Train))
    return Union[  # noqa: UP007, `|` cannot join two Annotated types
        Annotated[Submit, submit],
        Annotated[Train, train],
        Annotated[Status, tyro.conf.subcommand("status")],
        Annotated[Logs, tyro.conf.subcommand("logs")],
        Annotated[Data, tyro.conf.subcommand("data")],
    ]
