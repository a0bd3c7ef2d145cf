"""The files that the user's modules are made of, read without running them."""

import ast
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import all_suffixes
from pathlib import Path

# It is imported from where it is installed; user code may well import it.
OURS = "flowjobs"
IMPORTED_BY_NAME = {"import_module", "__import__"}
LONGEST_FILE_NAME = 200


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
    top = module.partition(".")[0]
    if top == OURS or top in sys.builtin_module_names:
        return
    for root in roots:
        if found := list(_in_folder(module, root)):
            yield from found
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
