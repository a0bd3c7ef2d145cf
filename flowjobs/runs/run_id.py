"""`run.json`: a run's id, random, given when its folder is made and kept for as long as it lives.

Never computed from a name or a path: a run that was deleted and submitted again is another run,
one whose study was moved is the same. The file also says where the run is. A folder that finds
there the path of another folder, with the same id, is a copy of that one and takes an id of its
own before it is told to anybody; where no run is at that path any more, it was moved.
"""

import logging
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from flowjobs.errors import ConfigError
from flowjobs.from_json import from_json
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.status import now

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inherited:
    """What the folder of a copy has of the original's, first in its files. Counted, for the clocks
    of the machines that wrote there need not agree.

    Attributes:
        jobs: How many of the jobs that were submitted.
        attempts: How many of the attempts.
    """

    jobs: int = 0
    attempts: int = 0


NOTHING = Inherited()
ALL = Inherited(sys.maxsize, sys.maxsize)


@dataclass(frozen=True)
class Identity:
    """Who a run is.

    Attributes:
        id: Its id, in W&B too.
        born: When it got it: UTC, in ISO 8601.
        folder: Where its folder is, links resolved.
        inherited: If it is a copy, what its folder has of the original's.
    """

    id: str
    born: str
    folder: str
    inherited: Inherited = NOTHING


def read_identity(folder: Path) -> Identity | None:
    """The identity in a run's folder; None if it has none, or if there is no such folder.

    Raises:
        ConfigError: The file is damaged.
        OSError: It cannot be read.
    """
    file = _file(folder)
    try:
        return from_json(Identity, read_json(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ConfigError(
            f"{file} is damaged ({error}): restore it, or delete it to continue as a new W&B run"
        ) from error


def give_identity(
    folder: Path,
    run_id: str | None = None,
    *,
    inherited: Inherited = NOTHING,
    flush: bool = True,
) -> Identity:
    """Give the run in `folder` an id: `run_id`, or a new one."""
    new = run_id or secrets.token_hex(6)
    identity = Identity(new, now(), os.path.realpath(folder), inherited)
    write_json(_file(folder), asdict(identity), flush=flush)
    return identity


def settled_identity(folder: Path, there: Callable[[], Inherited]) -> Identity | None:
    """The run's identity; a copied folder gets a new one, a moved folder keeps its id.

    The caller keeps others from doing the same at once. None and the errors are those of
    `read_identity`.

    Args:
        folder: The run's.
        there: Finds what is in the folder: the original's, if it is a copy that had no id yet.
    """
    found = read_identity(folder)
    if found is None or _is_at(found.folder, folder):
        return found
    try:
        copy = _is_copy(found)
        if copy and _shows_the_same(found.folder, folder):
            return found
    except (ConfigError, OSError) as error:
        # Not known whether it is a copy: an id is kept rather than replaced.
        logger.warning("is %s a copy of %s? It keeps its id (%s)", folder, found.folder, error)
        return found
    if not copy:
        return give_identity(folder, found.id, inherited=found.inherited)  # it was moved here
    new = give_identity(folder, inherited=there())
    logger.warning(
        "%s is a copy of %s: W&B gets it as a run of its own, %s", folder, found.folder, new.id
    )
    return new


def inherited(folder: Path) -> Inherited:
    """What the folder has of the original's, if it is a copy; all, before it has an id of its own.

    Writes nothing.
    """
    try:
        found = read_identity(folder)
        if found is None:
            return NOTHING
        if not is_same_folder(found.folder, folder) and _is_copy(found):
            return ALL
    except (ConfigError, OSError):
        return NOTHING  # not known to be a copy
    return found.inherited


def _is_copy(found: Identity) -> bool:
    """Whether a run that was found elsewhere than it says still is where it says, too."""
    there = read_identity(Path(found.folder))
    return there is not None and there.id == found.id


def _is_at(recorded: str, folder: Path) -> bool:
    """Whether the recorded path is this folder, through links and other mount points too."""
    try:
        return os.path.samefile(recorded, folder)
    except OSError:
        return False


def _shows_the_same(recorded: str, folder: Path) -> bool:
    """Whether what is written into this folder is in the recorded one: it is mounted twice."""
    mark = folder / f".same-{secrets.token_hex(6)}"
    mark.touch()
    try:
        return (Path(recorded) / mark.name).exists()
    finally:
        mark.unlink()


def is_same_folder(recorded: str, folder: Path) -> bool:
    """Whether the recorded path of a run is this folder, as far as can be told by looking.

    A file system that is mounted twice (a home and its NFS export, say) may number its files anew;
    the ctime of a copy is never the original's.
    """
    if _is_at(recorded, folder):
        return True
    try:
        there, here = (_file(each).stat() for each in (Path(recorded), folder))
    except OSError:
        return False
    if there.st_nlink > 1:
        return False  # a copy that was made of hard links (`cp -al`) has the very file
    return (there.st_ctime_ns, there.st_mtime_ns) == (here.st_ctime_ns, here.st_mtime_ns)


def _file(folder: Path) -> Path:
    return folder / "run.json"
