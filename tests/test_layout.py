"""The rooms of the package, and which of them may know which."""

import ast
import re
from pathlib import Path

import pytest

import flowjobs
from flowjobs.cli.commands import COMMANDS

PACKAGE = Path(flowjobs.__file__).parent

# From the command line down to the leaves. A room may import those of lower rows, and its own.
ROWS = (
    ("__main__",),
    ("cli", "__init__"),
    ("drill", "report", "sweeps"),
    ("jobs", "notebook"),
    ("training", "tracking"),
    ("evaluation",),
    ("flows", "models"),
    ("data",),
    ("toml_values",),
    ("runs", "slurm"),
    ("config", "user_code", "user_source"),
    ("field_values",),
    (
        "cgroups",
        "default_logging",
        "errors",
        "formatting",
        "from_json",
        "learning_rate",
        "nearest",
        "slots",
        "working_folder",
    ),
)
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}


def imports_of(source: str) -> set[str]:
    """The modules that a file imports, also inside of functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_way(file: Path, source: str) -> list[str]:
    """What a file imports from rooms of its own row, or above."""
    room = room_of(file)
    wrong = []
    for name in imports_of(source):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package != "flowjobs" or other not in ROW_OF:  # `flowjobs` alone says its version
            continue
        if other != room and ROW_OF[other] <= ROW_OF[room]:
            wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    return wrong


def room_of(file: Path) -> str:
    if file == PACKAGE / "training/__init__.py":
        return "notebook"  # the public names of the Python API, a trainer that tracks among them
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_rooms_import_only_those_below_them() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {room_of(file) for file in files} == set(ROW_OF)
    assert [line for file in files for line in wrong_way(file, file.read_text())] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("training/trainer.py", "from flowjobs.tracking.tracker import Tracker"),
        ("runs/run.py", "def f():\n    from flowjobs.jobs import submit"),
        ("slurm/client.py", "import flowjobs.runs.run"),
    ],
)
def test_an_import_the_wrong_way_is_found(file: str, source: str) -> None:
    assert len(wrong_way(PACKAGE / file, source)) == 1


@pytest.mark.parametrize("room", ["cli", "data", "jobs", "runs", "training"])
def test_the_map_of_a_room_names_each_of_its_files(room: str) -> None:
    files = {file.stem for file in (PACKAGE / room).glob("[!_]*.py")}
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    named = {*re.findall(r"\w+", text), *(COMMANDS if room == "cli" else ())}
    assert {*files, "not_in_the_map"} - named == {"not_in_the_map"}


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): imports_of(
            file.read_text()
        )
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py"
    }
    known = {
        name: {
            other
            for imported in found
            for other in (imported, imported.rpartition(".")[0])
            if other in graph
        }
        for name, found in graph.items()
    }
    assert circle_in(known) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """What is left when all that import nothing (any more) are taken away, again and again."""
    left = dict(graph)
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    return sorted(left)
