"""The user's own code: what an import path names, and the file and line where an error arose."""

import importlib
import importlib.util
import inspect
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowjobs.errors import ConfigError
from flowjobs.nearest import did_you_mean
from flowjobs.working_folder import working_folder

OURS = Path(__file__).parent
STDLIB = Path(sysconfig.get_path("stdlib"))
# Nobody mends a line of these. Other installed packages may be where users keep their models.
LIBRARIES = {"torch", "torchdiffeq", "ot", "numpy", "scipy", "sklearn", "PIL", "submitit", "wandb"}
# Where the folders of the snapshots were taken that this process imports from: users edit there.
_taken_from: dict[Path, Path] = {}
# Other names of arguments, without underscores. Which end of a path has which number is the user's.
SAME = dict.fromkeys(("time", "times", "timestep", "timesteps"), "t")
SAME |= {"xt": "x", "z": "x", "x1": "x0"}
NO_FILES = ("<frozen", "<string>", "<__array_function__")


def note_snapshot(folders: Mapping[Path, Path]) -> None:
    """Say where the folders of a snapshot were taken, so that errors name the files there."""
    _taken_from.update({folder.absolute(): top for folder, top in folders.items()})


def shown_path(path: Path) -> Path:
    """A file that the user edits as errors name it: relative below the working folder."""
    here = working_folder()
    return path.relative_to(here) if here and path.is_relative_to(here) else path


def is_installed(path: Path) -> bool:
    """Whether a module's file, or its folder, is of an installed package or of Python itself."""
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    return bool(installed) or path.is_relative_to(STDLIB)


def user_place(error: BaseException, *, installed: bool = True) -> str | None:
    """`my_models.py, line 12, in forward`: the innermost frame outside of libraries and flowjobs.

    Args:
        error: What was raised.
        installed: Take a frame of another installed package where there is none of the user's own
            files: some install the package that has their models.

    Returns:
        None if no frame is the user's. The path is relative where it is below the working folder.
    """
    # For text that a module evaluates, which is in no file ("<string>"), that module is named.
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return _in_words(error.filename, error.lineno, None)
    frames = [frame for frame in _innermost_first(error) if _may_be_users(frame.filename)]
    frames.sort(key=lambda frame: bool(_package(frame.filename)))
    if not installed:
        frames = [frame for frame in frames if not _package(frame.filename)]
    if not frames:
        return None
    return _in_words(frames[0].filename, frames[0].lineno, frames[0].name)


def text_of(error: BaseException) -> str:
    """What an error says, also where a class of the user's own fails as it is asked."""
    try:
        return str(error)
    except Exception:
        return "<exception str() failed>"  # as its traceback has it


def _innermost_first(error: BaseException | None) -> Iterator[traceback.FrameSummary]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield from reversed(traceback.extract_tb(error.__traceback__))
        error = error.__cause__ or error.__context__


def _may_be_users(file: str) -> bool:
    path, package = Path(file), _package(file)
    if package:
        return package not in LIBRARIES
    ours = path.is_relative_to(OURS) or path.name == "flowjobs"  # the console script
    return not (ours or path.is_relative_to(STDLIB) or file.startswith(NO_FILES))


def _package(file: str) -> str:
    """The installed package that a file is of, or ""."""
    parts = Path(file).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts[:-1]:
            return parts[parts.index(folder) + 1]
    return ""


def _in_words(file: str, line: int | None, function: str | None) -> str:
    path = (working_folder() or Path()) / file
    # The innermost: one folder of a snapshot may be in another.
    if folder := next((above for above in path.parents if above in _taken_from), None):
        path = _taken_from[folder] / path.relative_to(folder)
    place = f"{shown_path(path)}, line {line}"
    return place if function in (None, "<module>") else f"{place}, in {function}"


def check_module(option: str, value: str) -> None:
    """Raise a ConfigError unless there is the package of an import path; it is not imported.

    Args:
        option: For the error's text.
        value: `package.module:name`, maybe with a label.
    """
    path = value.rpartition("=")[2]
    if not is_import_path(path):
        raise ConfigError(f"{option}: found {value!r}, expected package.module:name")
    module, _, name = path.partition(":")
    package = module.partition(".")[0]
    if "/" in module or module.endswith(".py") or not package:
        parts = Path(module.removesuffix(".py")).parts
        meant = f"; did you mean {'.'.join(parts)}:{name}?"
        raise ConfigError(
            f"{option}: found {value!r}, expected package.module:name, as Python imports it"
            f"{meant if parts and all(part.isidentifier() for part in parts) else ''}"
        )
    if package == "__main__":
        raise ConfigError(
            f"{option}: found {value!r}, the script or notebook itself, which no job can import: "
            "put it into a file of its own, my_models.py, and give my_models:Name"
        )
    if importlib.util.find_spec(package) is None:
        beside = {file.stem for file in Path.cwd().glob("*.py")}
        raise ConfigError(
            f"{option} {value}: no module {package} in {Path.cwd()} or on PYTHONPATH"
            f"{did_you_mean(package, beside)}"
        )


def is_import_path(path: str) -> bool:
    """Whether this is `package.module:name`."""
    module, _, name = path.partition(":")
    return bool(module) and name.isidentifier()


def check_call(signature: inspect.Signature, what: str, arguments: Sequence[str]) -> None:
    """Raise a ConfigError unless a function can be called with these positional arguments, and
    names them in this order.

    Args:
        signature: The function's; a method's without `self`.
        what: For the error's text.
        arguments: Their names.
    """
    check_binds(signature, what, arguments)
    check_order(signature, what, arguments)


def check_binds(signature: inspect.Signature, what: str, arguments: Sequence[str]) -> None:
    """The same, whatever it calls them: a run that is under way keeps its code."""
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{what} takes {signature}, expected to be called with ({', '.join(arguments)})"
        ) from error


def check_order(signature: inspect.Signature, what: str, arguments: Sequence[str]) -> None:
    """Raise a ConfigError for a function whose parameters are named as the arguments in another
    order: torchcfm calls its models with (t, x). See `check_call`.
    """
    places = {name.replace("_", ""): place for place, name in enumerate(arguments)}
    names = [name.replace("_", "") for name in signature.parameters][: len(arguments)]
    found = [places[name] for name in (SAME.get(name, name) for name in names) if name in places]
    if found != sorted(found):
        raise ConfigError(
            f"{what} takes {signature}, expected ({', '.join(arguments)}): put them in this order"
        )


def imported(option: str, path: str) -> Any:
    """What `package.module:name` stands for; the module is imported.

    Args:
        option: That it was given to, for the error's text.
        path: The import path.

    Raises:
        ConfigError: There is no such module, or it has no such name.
    """
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the user's module exists; what it imports does not
        raise ConfigError(f"{option} {path}: no module {error.name} on PYTHONPATH") from error
    try:
        return getattr(found, name)
    except AttributeError as error:
        raise ConfigError(f"{option} {path}: the module {module} has no {name}") from error
