"""The user's code that a run keeps: snapshots by their content, and which one is a run's.

A snapshot is `STUDY/code/DIGEST`, made once and never changed, shared by all runs of that code. A
run names its own in `code.json`, by the digest alone, so that a study can be moved.
"""

import errno
import hashlib
import importlib
import itertools
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import ModuleType

from flowjobs.errors import ConfigError
from flowjobs.from_json import from_json
from flowjobs.runs.files import flush_folder, read_json
from flowjobs.runs.run import Run
from flowjobs.user_code import is_installed, note_snapshot, shown_path

DIGEST_DIGITS = 16
WRITERS = 16
# What Finder and Jupyter write into a folder that the user opens.
LEFT_BY_LOOKING = re.compile(r"(^|/)(\.DS_Store|\._[^/]*|\.ipynb_checkpoints/.*)$")


@dataclass(frozen=True)
class Code:
    """A run's `code.json`.

    Attributes:
        digest: The snapshot's.
        roots: The folders in it that modules are imported from, in the order of `sys.path`.
        folder: Where the files were taken.
        others: Where those were taken that are in `_2`, `_3` and so on, in this order.
        git_commit: What was checked out there; None outside a repository.
        git_dirty: Whether that commit lacks something of what was taken.
        left_out: Sources that were too large.
        earlier: The snapshots that the run was trained with before, oldest first.
    """

    digest: str
    roots: tuple[str, ...]
    folder: str
    git_commit: str | None = None
    git_dirty: bool | None = None
    left_out: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def snapshot(self, study: Path) -> Path:
        """The folder of the snapshot in a study."""
        return study / "code" / self.digest

    @property
    def folders(self) -> dict[str, Path]:
        """Where the folders in the snapshot were taken; the first is the snapshot itself."""
        tops = enumerate((self.folder, *self.others), start=1)
        return {subfolder(number): Path(top) for number, top in tops}

    def original(self, path: str) -> str:
        """The file that one in the snapshot is a copy of, as it is shown."""
        folder = PurePath(path).parts[0]
        if folder in self.folders:
            return str(shown_path(self.folders[folder] / PurePath(path).relative_to(folder)))
        return str(shown_path(Path(self.folder) / path))

    def import_roots(self, study: Path) -> list[Path]:
        """The folders that modules are imported from."""
        return [self.snapshot(study) / root for root in self.roots]


def subfolder(number: int) -> str:
    """Where in a snapshot the files of a tree are, by its number from 1.

    One tree is the rule; modules of a second repository get a folder of their own.
    """
    return f"_{number}" if number > 1 else ""


def code_of(run: Run) -> Code | None:
    """The code that a run keeps; None if it keeps none.

    Raises:
        ConfigError: `code.json` is damaged.
    """
    try:
        return from_json(Code, read_json(run.code_file))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{run.code_file} does not hold what it should ({error}): restore it, or remove it and "
            f"submit {run.name} with the code as it is now"
        ) from error


def import_from_snapshot(run: Run) -> None:
    """Have this process import the user's modules from the run's snapshot, if it has one.

    What is not in it (installed packages, files that git ignores) is imported from where it was.
    What another run's snapshot has been imported for is forgotten: one process may look at several.

    Raises:
        ConfigError: The snapshot is gone or was changed.
    """
    code = code_of(run)
    _forget_snapshots(run.study / "code", code.snapshot(run.study) if code else None)
    if code is None:
        return
    # All of it is read: code that was edited in there must not train under the old digest.
    read_snapshot(run.study, code.digest)
    snapshot = code.snapshot(run.study)
    note_snapshot({snapshot / folder: top for folder, top in code.folders.items()})
    for root in reversed(code.import_roots(run.study)):
        sys.path.insert(0, str(root))
    # Python remembers what a folder held when it last looked into it.
    importlib.invalidate_caches()


@contextmanager
def importing_from_snapshot(run: Run) -> Iterator[None]:
    """Import the user's modules from the run's snapshot while the block lasts.

    Also those that this process has imported from elsewhere: in a notebook they may be another
    version by now, and it has them again afterwards. What is built in the block keeps its code, but
    what that imports only as it is called comes from where the process imports.

    Raises:
        ConfigError: The snapshot is gone or was changed.
    """
    code = code_of(run)
    if code is None:
        yield
        return
    path, modules = [*sys.path], {**sys.modules}
    names = _module_names(read_snapshot(run.study, code.digest), code.roots)
    for name in names & modules.keys():
        if _may_be_users(modules[name]):
            del sys.modules[name]
    try:
        import_from_snapshot(run)
        yield
    finally:
        sys.path[:] = path
        for name in names & sys.modules.keys():
            if _may_be_users(sys.modules[name]):
                del sys.modules[name]
        sys.modules.update(modules)


def _may_be_users(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    # A package without a file is a folder; a module without one is built into Python.
    return hasattr(module, "__path__") if file is None else not is_installed(Path(file))


def _module_names(files: Iterable[str], roots: Iterable[str]) -> set[str]:
    """The names of the modules in a snapshot, and of the packages that they are in."""
    names: set[str] = set()
    for root, file in itertools.product(roots, map(PurePath, files)):
        if file.suffix == ".py" and file.is_relative_to(root):
            *packages, name = file.relative_to(root).with_suffix("").parts
            parts = packages if name == "__init__" else [*packages, name]
            names |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return names


def _forget_snapshots(snapshots: Path, but: Path | None) -> None:
    def is_other(file: str | None) -> bool:
        path = Path(file or "")
        return path.is_relative_to(snapshots) and not (but and path.is_relative_to(but))

    sys.path[:] = [folder for folder in sys.path if not is_other(folder)]
    # Runs' modules have the same names: one that was imported would win over the search path.
    for name, module in [*sys.modules.items()]:
        if is_other(getattr(module, "__file__", None)):
            del sys.modules[name]


def digest_of(files: Mapping[str, bytes]) -> str:
    """The digest of files by their paths."""
    whole = hashlib.sha256()
    for path in sorted(files):
        # With the length: no byte can move from one file to the next unseen.
        whole.update(os.fsencode(path) + b"\0%d\0" % len(files[path]))
        whole.update(files[path])
    return whole.hexdigest()[:DIGEST_DIGITS]


def read_snapshot(study: Path, digest: str) -> dict[str, bytes]:
    """The files of a snapshot by their paths in it.

    Raises:
        ConfigError: It is gone, or not what was taken.
    """
    folder = study / "code" / digest
    mend = "restore it (of a backup), or submit the run with --new-code"
    try:
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            # Python's own are written as modules are imported; NFS keeps removed files for a while.
            if path.is_file() and "__pycache__" not in path.parts and path.name[:4] != ".nfs"
        }
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror}): {mend}") from error
    if not files:
        raise ConfigError(f"the run's code is gone: there is no {folder}; {mend}")
    # Only where they are no part of it: git may track such files.
    own = {path: content for path, content in files.items() if not LEFT_BY_LOOKING.search(path)}
    for found in (files, own):
        if digest_of(found) == digest:
            return found
    raise ConfigError(f"the run's code was changed in {folder}: {mend}")


def write_snapshot(study: Path, files: Mapping[str, bytes]) -> None:
    """Keep files in a study, once and whole, also if several do so at once.

    Raises:
        ConfigError: There is a snapshot of that digest, and it was changed.
    """
    digest = digest_of(files)
    folder = study / "code" / digest
    if folder.exists():
        read_snapshot(study, digest)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{digest}.{uuid.uuid4().hex}.tmp")
    try:
        # Side by side: each waits for the disk, or for a file server.
        with ThreadPoolExecutor(WRITERS) as writers:
            list(writers.map(lambda path: _write(temporary / path, files[path]), files))
        try:
            # By a rename, so that a snapshot is there whole or not at all.
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            read_snapshot(study, digest)  # another submission was quicker
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_folder(folder.parent)


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as written:
        written.write(content)
        written.flush()
        os.fsync(written.fileno())
    with suppress(OSError):  # CIFS and FUSE may have no modes
        file.chmod(0o444 & file.stat().st_mode)  # an editor says that it is not to be changed
