"""Takes a snapshot of the user's code at a submission, and says what has changed since the last.

Taken are the sources of the repository that the user's modules are in, as git tracks or would
track them; outside a repository, and of what git ignores, those modules, what they import, and the
sources beside them. flowjobs itself is never taken, also where it is installed from that
repository: a run has the one that is installed. A run of built-in parts has no snapshot.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError, RunMismatchError
from flowjobs.models.imports import OURS, files_of_modules
from flowjobs.runs.code import (
    Code,
    code_of,
    digest_of,
    read_snapshot,
    subfolder,
    write_snapshot,
)
from flowjobs.runs.files import replaced_whole, write_json
from flowjobs.runs.run import Run
from flowjobs.slurm.client import said_if_slow
from flowjobs.user_code import is_installed

# "ask": changed code is an error that lists it. "submitted": what the run has is kept, and what has
# changed since is said. "live": none is kept, modules are imported from where they are.
CodeChoice = Literal["ask", "submitted", "keep", "new", "live"]

SOURCES = {".py", ".pyi", ".pyx", ".pxd", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
# Taken only if git tracks them: a study or another program's output has such files too.
SETTINGS = {".json", ".toml", ".yaml", ".yml", ".cfg", ".ini"}
# Folders that not everyone tells git to ignore.
NEVER = ("site-packages", "node_modules", "__pycache__", ".ipynb_checkpoints")
# A file that no user module imports may be this large, and all files together this.
FILE_LIMIT_MB = 1.0
TOTAL_LIMIT_MB = 20.0
DIFF_LIMIT_MB = 1.0
GIT_TIMEOUT_S = 60.0
SHOWN_AT_MOST = 20


@dataclass(frozen=True)
class CodePlan:
    """What becomes of the code that a run keeps; nothing is written yet.

    Attributes:
        run: The run.
        note: Notes to print, or "".
        files: The snapshot to keep, by path; none if there is nothing to write.
        code: What the run is to say of it; None leaves that as it is.
        diff: What git's commit lacks.
        forget: Whether the run is to keep none any more.
    """

    run: Run
    note: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    code: Code | None = None
    diff: bytes = b""
    forget: bool = False

    def carry_out(self) -> None:
        """Write the snapshot, and into the run's folder which one it is."""
        if self.files:
            write_snapshot(self.run.study, self.files)
        self.write_to_run(flush=True)

    def write_to_run(self, *, flush: bool) -> list[Path]:
        """Write into the run's folder which snapshot it keeps. Returns the files."""
        files = [self.run.code_file, self.run.code_diff_file]
        if self.forget:
            for kept in files:
                kept.unlink(missing_ok=True)
        if not self.code:
            return []
        with replaced_whole(self.run.code_diff_file, flush=flush) as file:
            file.write(self.diff)
        write_json(self.run.code_file, asdict(self.code), flush=flush)
        return files


def carry_out_together(plans: Iterable[CodePlan]) -> list[Path]:
    """Carry out many plans, each snapshot once. Returns what is yet to be flushed to the disk."""
    written: set[int] = set()
    files = []
    for plan in plans:
        # Runs of the same modules share one snapshot, see `plan_code_of`.
        if plan.files and id(plan.files) not in written:
            written.add(id(plan.files))
            write_snapshot(plan.run.study, plan.files)
        files += plan.write_to_run(flush=False)
    return files


def plan_code(
    run: Run,
    training: TrainingConfig,
    choice: CodeChoice = "ask",
    *,
    in_use: bool = False,
    take: "Callable[[tuple[str, ...], Path], Snapshot | None] | None" = None,
) -> CodePlan:
    """What code a run that is submitted now is trained with. Writes nothing.

    Args:
        run: The run.
        training: What is asked for.
        choice: What to do where the code is not what it was.
        in_use: Whether a job of the run waits or runs, so that its code must stay.
        take: What takes the snapshot; `take_snapshot` by default.

    Raises:
        RunMismatchError: The code has changed, and `choice` does not say which one is meant.
        ConfigError: The run's own code is gone, or git does not answer.
    """
    modules = training.user_modules
    if not modules:
        return CodePlan(run)
    kept = code_of(run)
    begun = in_use or run.started()
    match choice:
        case "live":
            where = "imports its code from where it is, as it is then"
            return CodePlan(run, f"{run.name} {where}" if kept else "", forget=True)
        case "keep" if kept or begun:
            return CodePlan(run)
        case "submitted" if kept or begun:
            return CodePlan(run, _changed_words(run, modules, kept) if kept else "")
    now = (take or take_snapshot)(modules, run.study)
    if now is None and not (kept and begun):
        return CodePlan(run, forget=kept is not None)
    if now is None:
        raise RunMismatchError(
            f"the code of {run.name} cannot be compared: no source of {', '.join(modules)} is "
            f"found from {Path.cwd()}; --keep-code resumes with the code that it has, "
            "--no-snapshot with what is installed"
        )
    if kept is None or not begun:
        return now.plan_for(run, "" if kept == now.code else now.description(run.study))
    if kept.digest == now.code.digest:
        return CodePlan(run, files=now.files)  # it may have been removed
    if choice == "new":
        code = dataclasses.replace(now.code, earlier=(*kept.earlier, kept.digest))
        note = f"{run.name} has new code from here\n{now.description(run.study)}"
        return dataclasses.replace(now, code=code).plan_for(run, note)
    return _keep_unless_it_matters(run, modules, kept, now)


def _keep_unless_it_matters(
    run: Run, modules: tuple[str, ...], kept: Code, now: "Snapshot"
) -> CodePlan:
    """Keep the code that a run has if what has changed since is nothing that it imports.

    Raises:
        RunMismatchError: It is; the text lists it.
    """
    differ, matter = _changes(run, modules, kept, now)
    if not matter:
        others = _shortened([f"{path} ({how})" for path, how in differ.items()], 3)
        return CodePlan(run, f"{run.name} keeps its code; it imports nothing of {others}")
    lines = _shortened([f"  {path}: {differ[path]}" for path in matter], SHOWN_AT_MOST, "\n")
    raise RunMismatchError(
        f"the code of {run.name} has changed since it was submitted:\n{lines}\n"
        f"--keep-code resumes with the code that it has ({kept.snapshot(run.study)}), --new-code "
        "with the code as it is now; or give the run on the new code another --name"
    )


def _changed_words(run: Run, modules: tuple[str, ...], kept: Code) -> str:
    """What has changed of the code that a run keeps; empty where nothing has that it imports, or
    where the code of now is not to be found from here."""
    try:
        now = take_snapshot(modules, run.study)
        if now is None or now.code.digest == kept.digest:
            return ""
        _, matter = _changes(run, modules, kept, now)
    except ConfigError:  # what is not here, or lost, is found where the run starts
        return ""
    if not matter:
        return ""
    changed = _shortened(matter, 3)
    return f"{run.name} keeps its code; changed since: {changed} (--new-code resumes with that)"


def _changes(
    run: Run, modules: tuple[str, ...], kept: Code, now: "Snapshot"
) -> tuple[dict[str, str], list[str]]:
    """What has changed since a run's code was kept, by the path that is shown, and what of that the
    run imports."""
    folder = kept.snapshot(run.study)
    used_before = {
        str(path.relative_to(folder))
        for path in files_of_modules(modules, kept.import_roots(run.study))
    }
    differ = _differences(read_snapshot(run.study, kept.digest), now.files)
    used = used_before | now.used
    shown = {path: (now.code if path in now.files else kept).original(path) for path in differ}
    return (
        {shown[path]: how for path, how in differ.items()},
        [shown[path] for path in differ if path in used],
    )


@dataclass(frozen=True)
class Snapshot:
    """A snapshot in memory.

    Attributes:
        files: Their content, by path.
        used: The paths of what the user's modules are made of.
        code: What a run with it is to say of it.
        diff: What git's commit lacks.
        remarks: Notes to print on how it was taken.
    """

    files: Mapping[str, bytes]
    used: frozenset[str]
    code: Code
    diff: bytes
    remarks: tuple[str, ...]

    def plan_for(self, run: Run, note: str) -> CodePlan:
        """The plan of a run that is to have this code."""
        return CodePlan(run, note, self.files, self.code, self.diff)

    def description(self, study: Path) -> str:
        """Notes to print on it."""
        number = f"{len(self.files)} files" if len(self.files) > 1 else "1 file"
        place = self.code.snapshot(study)
        lines = [f"its code is kept: {number} of {self.code.folder} in {place}", *self.remarks]
        if self.code.left_out:
            left_out = [self.code.original(path) for path in self.code.left_out]
            lines.append(f"  without {_shortened(left_out, 5)}: too large")
        return "\n".join(lines)


def _differences(before: Mapping[str, bytes], now: Mapping[str, bytes]) -> dict[str, str]:
    words = {}
    for path in sorted({*before, *now}):
        if before.get(path) != now.get(path):
            words[path] = "gone" if path not in now else "changed" if path in before else "new"
    return words


def _shortened(words: Iterable[str], at_most: int, between: str = ", ") -> str:
    shown = list(words)
    more = [f"and {len(shown) - at_most} more"] if len(shown) > at_most else []
    return between.join([*shown[:at_most], *more])


def take_snapshot(modules: tuple[str, ...], study: Path) -> Snapshot | None:
    """The snapshot as it would be taken now; None if all modules are of installed packages."""
    roots = _import_roots(modules)
    used = files_of_modules(modules, roots)
    trees: dict[Path, _Tree] = {}
    for file in used:
        root = next(root for root in roots if file.is_relative_to(root))
        if not any(root.is_relative_to(top) for top in trees):
            tree = _Tree.of(root)
            trees[tree.top] = tree
    if not trees:
        return None
    files: dict[str, bytes] = {}
    wanted: set[str] = set()
    left_out: list[str] = []
    in_snapshot: list[str] = []
    for number, (top, tree) in enumerate(trees.items(), start=1):
        prefix = Path(subfolder(number))
        own = [file.relative_to(top) for file in used if file.is_relative_to(top)]
        inside = [root.relative_to(top) for root in roots if root.is_relative_to(top)]
        tree.add(own, inside)
        found, too_large = _read(tree, own, inside, study)
        files |= {str(prefix / path): content for path, content in found.items()}
        left_out += [str(prefix / path) for path in too_large]
        wanted |= {str(prefix / path) for path in own}
        holding = [root for root in inside if any(Path(f).is_relative_to(root) for f in found)]
        in_snapshot += [str(prefix / root) for root in holding]
    first = next(iter(trees.values()))
    dirty = first.commit and (first.dirty or any(not first.tracks(f) for f in used))
    code = Code(
        digest=digest_of(files),
        roots=tuple(in_snapshot),
        folder=str(first.top),
        git_commit=first.commit,
        git_dirty=None if first.commit is None else bool(dirty),
        left_out=tuple(left_out),
        others=tuple(str(top) for top in list(trees)[1:]),
    )
    remarks = tuple(f"  {tree.why}" for tree in trees.values() if tree.why)
    return Snapshot(files, frozenset(wanted), code, first.diff, remarks)


def _import_roots(modules: tuple[str, ...]) -> list[Path]:
    """The folders that a user's modules are imported from, in the order of the search."""
    roots = [Path(entry or ".") for entry in sys.path]
    for module in modules:  # an editable install may have a finder of its own
        spec = importlib.util.find_spec(module.partition(".")[0])
        if spec and spec.submodule_search_locations:
            roots += [Path(folder).parent for folder in spec.submodule_search_locations]
        elif spec and spec.origin:
            roots.append(Path(spec.origin).parent)
    # Python passes over what may not be entered, which is an error to Path.is_dir().
    found = [root.resolve() for root in roots if os.path.isdir(root) and not is_installed(root)]
    return list(dict.fromkeys(found))


@dataclass
class _Tree:
    """The files of one repository, or of a folder outside any.

    Attributes:
        top: Its root.
        in_repository: Whether git lists its files.
        listed: Paths below it that may be taken, and whether git tracks them.
        commit: What is checked out.
        dirty: Whether a tracked file differs from that.
        diff: How.
        why: Why git was not asked, where the user would not expect that.
    """

    top: Path
    in_repository: bool = False
    listed: dict[str, bool] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool = False
    diff: bytes = b""
    why: str = ""

    @classmethod
    def of(cls, root: Path) -> "_Tree":
        """The tree that an import root is in."""
        try:
            top = Path(os.fsdecode(_git(root, "rev-parse", "--show-toplevel")[:-1]))
            excluded = [f"--exclude={name}" for name in NEVER]
            said = _git(top, "ls-files", "-z", "-t", "-co", "--exclude-standard", *excluded)
        except _NoRepositoryError as error:
            return cls(root, why=str(error))
        entries = [entry.partition(" ") for entry in os.fsdecode(said).split("\0") if entry]
        tree = cls(top, True, {path: tag != "?" for tag, _, path in entries})
        try:
            tree.commit = _git(top, "rev-parse", "HEAD").decode().strip()
            tree.dirty = bool(_git(top, "status", "--porcelain", "--untracked-files=no"))
            tree.diff = _cut(_git(top, "diff", "--no-ext-diff", "--no-color", "HEAD"))
        except _NoRepositoryError:
            pass  # no commit yet
        return tree

    def add(self, used: Iterable[Path], roots: Iterable[Path]) -> None:
        """Take in modules, also those that git ignores; without git also what is beside them."""
        roots = {*roots}
        for path in used:
            beside: Iterable[Path] = ()
            if not self.in_repository:
                folder = self.top / path.parent
                # The whole package of a module; of one in no package its neighbours.
                beside = folder.glob("*") if path.parent in roots else folder.rglob("*")
            for file in (self.top / path, *beside):
                self.listed.setdefault(str(file.relative_to(self.top)), False)

    def tracks(self, file: Path) -> bool:
        """Whether git tracks a file."""
        return file.is_relative_to(self.top) and self.listed.get(
            str(file.relative_to(self.top)), False
        )


def _read(
    tree: _Tree, used: Iterable[Path], roots: Iterable[Path], study: Path
) -> tuple[dict[str, bytes], list[str]]:
    """The content of a tree's sources, and those that are too large."""
    used = {*used}
    sizes: dict[Path, int] = {}
    for name, tracked in tree.listed.items():
        path = Path(name)
        is_source = path.suffix in SOURCES or (tracked and path.suffix in SETTINGS)
        if path in used or (is_source and not _never(tree.top / path, path, roots, study)):
            try:
                if (tree.top / path).is_file():
                    sizes[path] = (tree.top / path).stat().st_size
            except OSError:
                continue  # it has been removed meanwhile
    total = 0.0
    taken, left_out = [], []
    # What is imported is never left out; of the others the small ones come first.
    for path in sorted(sizes, key=lambda path: (path not in used, sizes[path], str(path))):
        size_mb = sizes[path] / 1e6
        too_large = size_mb > FILE_LIMIT_MB or total + size_mb > TOTAL_LIMIT_MB
        if path not in used and too_large:
            left_out.append(f"{path} ({size_mb:.1f} MB)")
            continue
        total += size_mb
        taken.append(path)
    return {str(path): (tree.top / path).read_bytes() for path in taken}, left_out


def _never(file: Path, path: Path, roots: Iterable[Path], study: Path) -> bool:
    """Whether a file is flowjobs' own, a study's, or an installed package's."""
    own = any((root / OURS) in path.parents for root in roots)
    of_study = file.is_relative_to(study) or file.is_relative_to(study.resolve())
    return own or of_study or bool({*NEVER} & {*path.parts})


class _NoRepositoryError(Exception):
    """There is no repository that git would list; empty where that is nothing unusual."""


def _git(folder: Path, *arguments: str) -> bytes:
    # Without optional locks, `status` writes nothing.
    environment = {**os.environ, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        with said_if_slow(f"git {arguments[0]} in {folder} has not answered yet", GIT_TIMEOUT_S):
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                env=environment,
                timeout=GIT_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
    except FileNotFoundError:
        why = "git is not installed" if _in_repository(folder) else ""
        raise _NoRepositoryError(why) from None
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"git did not list the files of {folder} within {GIT_TIMEOUT_S:g} s: repeat the "
            "command, or submit with --no-snapshot"
        ) from error
    if done.returncode:
        said = next(iter(done.stderr.decode(errors="replace").splitlines()), "git failed")
        raise _NoRepositoryError(f"git: {said}" if _in_repository(folder) else "")
    return done.stdout


def _in_repository(folder: Path) -> bool:
    return any((above / ".git").exists() for above in (folder, *folder.parents))


def _cut(diff: bytes) -> bytes:
    limit = int(DIFF_LIMIT_MB * 1e6)
    return diff if len(diff) <= limit else diff[:limit] + b"\n(cut: the diff is longer)\n"
