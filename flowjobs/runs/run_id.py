"""`run.json`: a run's id, random, given when its folder is made and kept for as long as it lives.

Never computed from a name or a path: a run that was deleted and submitted again is another run,
one whose study was moved is the same. The file also says where the run is. A folder that finds
there the path of another folder, with the same id, is a copy of that one and takes an id of its
own before it is told to anybody; where no run is at that path any more, it was moved.
"""

import json
import logging
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from flowjobs.errors import ConfigError
from flowjobs.runs.files import write_json
from flowjobs.runs.status import now

logger = logging.getLogger(__name__)

# Later than any time in ISO 8601.
AFTER_ALL = "9999"


@dataclass(frozen=True)
class Identity:
    """Who a run is.

    Attributes:
        id: Its id, in W&B too.
        born: When it got it: UTC, in ISO 8601.
        folder: Where its folder is, links resolved.
        copied: If it is a copy, since when it is a run of its own: what its folder has of jobs
            before that are the original's.
    """

    id: str
    born: str
    folder: str
    copied: str = ""


def read_identity(folder: Path) -> Identity | None:
    """The identity in a run's folder; None if it has none, or if there is no such folder.

    Raises:
        ConfigError: The file is damaged.
        OSError: It cannot be read.
    """
    file = _file(folder)
    try:
        found = json.loads(file.read_text())
        run_id, born, at = (str(found[name]) for name in ("id", "born", "folder"))
        return Identity(run_id, born, at, str(found.get("copied", "")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}): restore it, or delete it to go on as a new W&B run"
        ) from error


def give_identity(
    folder: Path, run_id: str | None = None, *, copied: str = "", flush: bool = True
) -> Identity:
    """Give the run in `folder` an id: `run_id`, or a new one."""
    new = run_id or secrets.token_hex(6)
    identity = Identity(new, now(), os.path.realpath(folder), copied)
    write_json(_file(folder), asdict(identity), flush=flush)
    return identity


def settled_identity(folder: Path) -> Identity | None:
    """The identity of the run in `folder`, which a copy of another run gets here.

    The caller keeps others from doing the same at once. None and the errors are those of
    `read_identity`.
    """
    found = read_identity(folder)
    if found is None or _is_at(found.folder, folder):
        return found
    try:
        copy = _is_copy(found)
    except (ConfigError, OSError) as error:
        # Not known whether it is a copy: an id is kept rather than replaced.
        logger.warning("is %s a copy of %s? It keeps its id (%s)", folder, found.folder, error)
        return found
    if not copy:
        return give_identity(folder, found.id, copied=found.copied)  # it was moved here
    new = give_identity(folder, copied=now())
    logger.warning(
        "%s is a copy of %s: W&B gets it as a run of its own, %s", folder, found.folder, new.id
    )
    return new


def own_since(folder: Path) -> str | None:
    """Since when what the folder has of jobs are its own; None: always have been. Writes nothing.

    Of a copy that has no id of its own yet none are, and the answer is after all times.
    """
    try:
        found = read_identity(folder)
        if found is None:
            return None
        if not _is_at(found.folder, folder) and _is_copy(found):
            return AFTER_ALL
    except (ConfigError, OSError):
        return None  # not known to be a copy
    return found.copied or None


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


def _file(folder: Path) -> Path:
    return folder / "run.json"
