"""Parses the command line, runs the command, turns errors into words and exit codes."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, Union

import tyro

from flowjobs.cli.cancel import Cancel
from flowjobs.cli.checkpoint import Checkpoint
from flowjobs.cli.data import Data
from flowjobs.cli.defaults import Defaults, load_defaults
from flowjobs.cli.drill import Drill
from flowjobs.cli.logs import Logs
from flowjobs.cli.reconcile import Reconcile
from flowjobs.cli.status import Status
from flowjobs.cli.submit import Submit
from flowjobs.cli.sync import Sync
from flowjobs.cli.train import Train
from flowjobs.config import KeyValues
from flowjobs.errors import FlowjobsError
from flowjobs.runs.status import EXIT_CANCELLED

COMMANDS: dict[str, Any] = {
    "submit": Submit,
    "train": Train,
    "status": Status,
    "logs": Logs,
    "cancel": Cancel,
    "reconcile": Reconcile,
    "sync": Sync,
    "data": Data,
    "checkpoint": Checkpoint,
    "drill": Drill,
}

DESCRIPTION = """Flow-matching ablations on a preemptible Slurm cluster, or on this machine.

Exit codes: 0 done; 1 the run failed; 2 bad input, nothing was done; 75 preempted or
Ctrl-C, the same command goes on; 130 cancelled.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `flowjobs` and `python -m flowjobs`. Always exits."""
    exit_with(lambda: run(sys.argv[1:] if arguments is None else arguments))


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Exit with a command's exit code, or with that of the error that it raises, in words."""
    # A user's own model is looked up from here, also by the console script.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        sys.exit(command())
    except FlowjobsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        # Not of the program: something else lies where a study has a file or a folder.
        print(f"error: {error.filename}: {error.strerror}; move it away", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(EXIT_CANCELLED)
    except BrokenPipeError:
        # `flowjobs logs RUN | head`: nothing is left to tell anyone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command. Returns its exit code."""
    command, defaults = parse(arguments)
    code: int = command.run(defaults)
    return code


def parse(arguments: Sequence[str]) -> tuple[Any, Defaults]:
    """The command that is meant, and the defaults that it was filled with."""
    defaults = load_defaults(arguments=arguments)
    if "study" in defaults.values:
        # Every command looks there for the study, and a flag wins over it.
        os.environ.setdefault("FLOWJOBS_STUDY", str(defaults.values.pop("study")))
    name, *rest = arguments or ("",)
    if name not in COMMANDS:
        # Help, or a word that is no command: tyro lists those that there are, and exits.
        every: Any = Union[  # noqa: UP007, `|` cannot join types made at run time
            tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in COMMANDS.items())
        ]
        _parse(every, "flowjobs", arguments, description=DESCRIPTION)
    # The parser of one command alone is built in half the time of all of them.
    cls = COMMANDS[name]
    default: dict[str, Any] = {}
    if cls in (Submit, Train):
        default = {"default": defaults.fill(cls)}
    elif cls is Drill:
        default = {"default": Drill.with_defaults(defaults)}
    return _parse(cls, f"flowjobs {name}", rest, **default), defaults


def _parse(command: Any, prog: str, arguments: Sequence[str], **options: Any) -> Any:
    config = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.DisallowNone,
    )
    registry = _registry()
    return tyro.cli(command, prog=prog, args=arguments, config=config, registry=registry, **options)


def _registry() -> tyro.constructors.ConstructorRegistry:
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def key_values(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[KeyValues] | None:
        if info.type is not KeyValues:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="KEY=VALUE",
            instance_from_str=KeyValues.parse,
            is_instance=lambda value: isinstance(value, KeyValues),
            str_from_instance=lambda values: [f"{key}={value}" for key, value in values.items()],
        )

    return registry
