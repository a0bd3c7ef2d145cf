"""Parses the command line, runs the command, turns errors into words and exit codes."""

import dataclasses
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, Union

import tyro

from flowjobs import __version__
from flowjobs.cli.commands import COMMANDS, command_of
from flowjobs.cli.defaults import CommandOptions, Defaults, InStudy, WithDefaults, load_defaults
from flowjobs.cli.output import Output, lasting_outputs
from flowjobs.cli.parser import ParserExit, read_command_line
from flowjobs.errors import ConfigError, FlowjobsError, UserCodeExitError
from flowjobs.nearest import did_you_mean
from flowjobs.runs.files import FILE_SERVER_IS_AWAY
from flowjobs.runs.hint import hint, program
from flowjobs.runs.status import EXIT_BAD_INPUT, EXIT_CANCELLED, EXIT_FAILED, outcome_of
from flowjobs.slots import submitted_for_run
from flowjobs.user_code import user_place
from flowjobs.working_folder import working_folder

# `flowjobs logs -f RUN | head`: these print, and end where nobody reads it. The others act.
LOOKING = ("status", "show", "report", "logs")

# Errors of files that are no bug of the program, and what the user can do.
OF_THE_MACHINE = {
    **dict.fromkeys(FILE_SERVER_IS_AWAY, "the file system was away; repeat the command"),
    errno.EACCES: "ask its owner, or give another --study",
    errno.EPERM: "ask its owner, or give another --study",
    errno.EROFS: "give another --study",
    errno.ENOSPC: "make room, then repeat the command",
    errno.EDQUOT: "make room in your quota, then repeat the command",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), then repeat the command",
    errno.ENOTDIR: "something else lies where a study has a folder; move it away",
    errno.EISDIR: "something else lies where a study has a file; move it away",
    errno.EEXIST: "something else lies where a study has a folder; move it away",
    errno.ENOENT: "was it removed meanwhile?",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "mend the link",
    errno.EIO: "the file system does not read or write; repeat the command later",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}

DESCRIPTION = """Flow-matching ablations on a preemptible Slurm cluster, or on this machine.

Exit codes: 0 done; 1 the run failed; 2 bad input, nothing was trained; 75 preempted, or \
training stopped by Ctrl-C: the same command resumes; 130 cancelled, or another command stopped by \
Ctrl-C (0 where it only watched).
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `flowjobs` and `python -m flowjobs`. Always exits."""
    exit_with(lambda: run(sys.argv[1:] if arguments is None else arguments))


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Exit with a command's exit code, or with that of the error that it raises, in words."""
    with lasting_outputs():
        try:
            _look_up_models_here()
            code: Any
            try:
                code = command()
            except SystemExit as ended:
                if not isinstance(ended, ParserExit) and user_place(ended, installed=False):
                    raise UserCodeExitError(ended) from ended
                code = ended.code
            sys.stdout.flush()
            if not code and isinstance(sys.stdout, Output):
                sys.stdout.check()
            sys.exit(code)
        except KeyboardInterrupt:
            sys.exit(EXIT_CANCELLED)
        except Exception as error:
            sys.exit(_exit_code_of(error))


def _look_up_models_here() -> None:
    here = working_folder()
    # The last lines of a run's own batch script need none: somebody may have removed it meanwhile.
    if here is None and not submitted_for_run():
        raise ConfigError("the working directory is gone: go to one that is there")
    # A user's own model is looked up from here, also by the console script.
    if here and str(here) not in sys.path:
        sys.path.insert(0, str(here))


def _exit_code_of(error: Exception) -> int:
    """Print an error: in words if the user can fix it, else with its traceback."""
    if isinstance(error, FlowjobsError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    of_a_user = user_place(error, installed=False)
    of_a_socket = isinstance(error, ConnectionError) and not error.filename
    bug = of_a_user or of_a_socket
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE and not bug:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; {OF_THE_MACHINE[error.errno]}", file=sys.stderr)
        return EXIT_BAD_INPUT
    traceback.print_exception(error)
    # The last line is what is read: it names the line of the user's own code.
    print(f"error: {outcome_of(error).reason}", file=sys.stderr)
    return EXIT_FAILED


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command. Returns its exit code."""
    if list(arguments) == ["--version"]:
        print(f"flowjobs {__version__}")
        return 0
    command, defaults = parse(arguments)
    if arguments[0] in LOOKING and isinstance(sys.stdout, Output):
        sys.stdout.ends_with_its_reader()
    code: int = command.run(defaults)
    return code


def _needs_no_file(arguments: Sequence[str]) -> bool:
    """Whether a command works without a flowjobs.toml that has a mistake: it only looks, or would
    take nothing but the study from it, and has that. `reconcile` in the last lines of a batch
    script is one: somebody may be editing the file at that moment."""
    name = arguments[0] if arguments else ""
    if name in LOOKING:
        return True
    if name not in COMMANDS or issubclass(cls := command_of(name), CommandOptions | WithDefaults):
        return False
    study_given = any(word.partition("=")[0] == "--study" for word in arguments)
    return not issubclass(cls, InStudy) or study_given or bool(os.environ.get("FLOWJOBS_STUDY"))


def _warn_of_file(error: str) -> None:
    if submitted_for_run():
        return  # the last line of a job's log may be taken for why it ended
    print(f"warning: {error}; the file is not used", file=sys.stderr)


def _named(name: str) -> Any:
    """A command without its options, to be listed."""
    described = dataclasses.make_dataclass(name, (), namespace={"__doc__": COMMANDS[name][1]})
    return Annotated[described, tyro.conf.subcommand(name)]


def parse(arguments: Sequence[str]) -> tuple[Any, Defaults]:
    """The command, and the defaults that it was filled with."""
    if arguments[:1] == ["sweep"]:
        arguments = command_of("sweep").spelled_out(arguments)
    warn = _warn_of_file if _needs_no_file(arguments) else None
    defaults = load_defaults(arguments=arguments, warn=warn)
    if "study" in defaults.values:
        # Every command looks there for the study, and so does each job that it submits; a flag
        # wins over it.
        study = str(defaults.values.pop("study"))
        os.environ["FLOWJOBS_STUDY"] = os.environ.get("FLOWJOBS_STUDY") or study
    name, *rest = arguments or ("",)
    # As the last line of a mistake it is typed as it stands; help says what the program is called.
    asks = {"-h", "--help"} & {*arguments}
    if name not in COMMANDS:
        if name and not name.startswith("-"):
            raise ConfigError(
                f"found {name}, expected a command: {', '.join(COMMANDS)}"
                f"{did_you_mean(name, COMMANDS)}"
            )
        # Help, or nothing: tyro lists the commands, and exits.
        # `|` cannot join types made at run time.
        every: Any = Union[tuple(_named(name) for name in COMMANDS)]  # noqa: UP007
        called = "flowjobs" if asks else program("flowjobs")
        read_command_line(every, called, arguments, description=DESCRIPTION)
    # The parser of one command alone is built in half the time of all of them.
    cls = command_of(name)
    default: dict[str, Any] = {}
    if issubclass(cls, WithDefaults):
        default = {"default": cls.with_defaults(defaults)}
    if examples := getattr(sys.modules[cls.__module__], "EXAMPLES", ""):
        default["description"] = f"{examples}\n{cls.__doc__}"
    command = read_command_line(cls, f"flowjobs {name}" if asks else hint(name), rest, **default)
    if isinstance(command, CommandOptions) and "--cluster" not in defaults.flags:
        # Also of those that name a run, and have no default as a whole.
        cluster = defaults.values.get("cluster", command.cluster)
        command = dataclasses.replace(command, cluster=cluster)
    return command, defaults
