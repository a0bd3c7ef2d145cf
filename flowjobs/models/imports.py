"""The files that the user's modules are made of, read without running them."""

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.machinery import all_suffixes
from pathlib import Path

from flowjobs.user_code import is_installed, shown_path

# It is imported from where it is installed; user code may well import it.
OURS = "flowjobs"
IMPORTED_BY_NAME = {"import_module", "__import__"}
LONGEST_FILE_NAME = 200
# What decides as a module runs what is found by which name.
CHANGES_IMPORTS = re.compile(
    rb"\bsys\.(meta_path|modules|path)|\bfrom sys import|\baddsitedir\b|\bsetup_root\b"
)


def files_of_modules(modules: Iterable[str], roots: Sequence[Path]) -> list[Path]:
    """The files of modules, of all that they import, and those that they name beside themselves.

    A file that a module finds by a name that it makes up as it runs is not seen.

    Args:
        modules: Their full names.
        roots: The folders that are searched for modules, in this order; what is found in none
            (installed packages, the standard library) is left out.

    Returns:
        Each file once, in the order in which they are found.
    """
    waiting = [file for module in modules for file in _in_roots(module, roots)]
    found: dict[Path, None] = {}
    while waiting:
        file = waiting.pop(0)
        if file in found:
            continue
        found[file] = None
        if file.suffix == ".py":
            waiting += _imported_by(file, roots)
    return list(found)


def missing_imports(modules: Iterable[str]) -> list[str]:
    """What the user's modules import, and what surely is not there for this Python, in words.

    Looked at are the imports that a module surely comes to (not those within try, if or a function)
    and, by these, the user's other modules; none where one of them changes how imports are found.

    Args:
        modules: Their full names.
    """
    entries = [Path(entry or ".").absolute() for entry in sys.path]
    roots = [root for root in entries if os.path.isdir(root) and not is_installed(root)]
    waiting, seen = [*modules], set[Path]()
    found: dict[str, None] = {}
    with suppress(OSError):  # a folder that may not be read, say
        sources = [file for file in files_of_modules(waiting, roots) if file.suffix == ".py"]
        if any(CHANGES_IMPORTS.search(file.read_bytes()) for file in sources):
            return []
        while waiting:
            for file, root in _in_roots_with_root(waiting.pop(0), roots):
                if file in seen:
                    continue
                seen.add(file)
                package = file.parent.relative_to(root).parts
                for line, level, name in _certain_imports(file):
                    base = package[: len(package) + 1 - level] if level else ()
                    if level > len(package):
                        said = "has a relative import beyond its top-level package, which fails"
                        found[f"{shown_path(file)}:{line} {said}"] = None
                    elif not level and _is_missing(top := name.partition(".")[0]):
                        said = f"imports {top}, which is not installed here"
                        found[f"{shown_path(file)}:{line} {said}"] = None
                    else:
                        waiting.append(".".join([*base, name]))
    return list(found)


def _certain_imports(file: Path) -> Iterator[tuple[int, int, str]]:
    """Line, level and name of what a module imports in any case; nothing of one that is no text."""
    if file.suffix != ".py":
        return
    with suppress(SyntaxError, ValueError, RecursionError):
        for node in ast.parse(file.read_bytes()).body:
            match node:
                case ast.Import(names):
                    yield from ((node.lineno, 0, alias.name) for alias in names)
                case ast.ImportFrom(module, names, level):
                    start = f"{module}." if module else ""
                    yield from ((node.lineno, level, f"{start}{alias.name}") for alias in names)


def _is_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except (ImportError, ValueError):
        return False  # of one that is loaded and does not say from where


def _imported_by(file: Path, roots: Sequence[Path]) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                for alias in names:
                    yield from _in_roots(alias.name, roots)
            case ast.ImportFrom(module, names, level):
                for alias in names:
                    name = f"{module}.{alias.name}" if module else alias.name
                    if level:
                        yield from _in_folder(name, file.parents[level - 1])
                    else:
                        yield from _in_roots(name, roots)
            case ast.Call(func, [ast.Constant(str(name)), *_]):
                called = getattr(func, "attr", None) or getattr(func, "id", None)
                if called in IMPORTED_BY_NAME:
                    yield from _in_roots(name, roots)
            case ast.Constant(str(name)) if "." in name and len(name) <= LONGEST_FILE_NAME:
                yield from _beside(file, name)


def _beside(file: Path, name: str) -> Iterator[Path]:
    if ".." in Path(name).parts or "\0" in name or Path(name).is_absolute():
        return
    beside = file.parent / name
    if os.path.isfile(beside):
        yield beside


def _in_roots(module: str, roots: Sequence[Path]) -> Iterator[Path]:
    """The file of a module, and those of the packages it is in; that of a package's attribute."""
    yield from (file for file, _ in _in_roots_with_root(module, roots))


def _in_roots_with_root(module: str, roots: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """The same, each with the root that it is in."""
    top = module.partition(".")[0]
    if top == OURS or top in sys.builtin_module_names:
        return
    for root in roots:
        if found := list(_in_folder(module, root)):
            yield from ((file, root) for file in found)
            return


def _in_folder(module: str, folder: Path) -> Iterator[Path]:
    for part in filter(None, module.split(".")):
        # As Python does it: in a folder that may not be entered there is none.
        if os.path.isfile(init := folder / part / "__init__.py"):
            yield init
        else:
            files = (folder / f"{part}{suffix}" for suffix in all_suffixes())
            yield from [file for file in files if os.path.isfile(file)][:1]
        folder = folder / part
