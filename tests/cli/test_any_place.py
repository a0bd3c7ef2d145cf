"""Every command on a disk, in a study and in an environment that is not as it should be.

Each gives what is asked for, or an error in words with exit code 2; never a traceback.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Command

QUICK = ("--wandb-mode", "disabled", "--epochs", "1", "--arch-args", "width=8", "depth=1")
COMMANDS: dict[str, Sequence[str]] = {
    "version": ["--version"],
    "help": ["submit", "--help"],
    "status": ["status"],
    "status of one": ["status", "a"],
    "json": ["status", "--json"],
    "selection": ["status", "flow=icfm"],
    "show": ["show", "a"],
    "report": ["report"],
    "page in the study": ["report", "--html", "study/page.html"],
    "logs": ["logs", "a"],
    "cancel": ["cancel", "a"],
    "reconcile": ["reconcile"],
    "sync": ["sync"],
    "dry run": ["submit", "--dry-run", "--name", "b"],
    "submit": ["submit", "--cluster", "local", "--name", "b", *QUICK],
    "resume": ["resume", "a", "--cluster", "local"],
    "train": ["train", "--name", "c", *QUICK],
    "train on": ["train", "--name", "a", *QUICK, "--epochs", "2"],
    "split": ["data", "split", "x.npy", "--sizes", "20"],
    "inspect": ["checkpoint", "inspect", "study/checkpoints/a/best.pt"],
    "plan": ["sweep", "--seed", "0", "1", "--cluster", "local", "--dry-run", *QUICK],
    "sweep": ["sweep", "--seed", "0", "--name", "s", "--cluster", "local", *QUICK],
    "retry": ["retry", "a", "--cluster", "local"],
    "wait": ["wait", "a"],
    "rm": ["rm", "a", "--yes"],
    "drill": ["drill", "--cluster", "local", "--steps", "0"],
}
# Each command in a process of its own, forked from one that has loaded what they load.
RUNNER = """
import importlib, json, os, pkgutil, sys
import flowjobs
for module in pkgutil.walk_packages(flowjobs.__path__, "flowjobs."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from flowjobs.cli import main
codes = {}
for name, words in json.loads(sys.argv[1]).items():
    if not (child := os.fork()):
        main(words)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
open(sys.argv[2], "w").write(json.dumps(codes))
"""
AS_A_STRANGER = ["unshare", "--user", "--map-user=64123", "--map-group=64123"]
PLACES = {
    "a read-only disk": [
        *("unshare", "--mount", "sh", "-c"),
        'mount --bind study study && mount -o remount,ro,bind study && exec "$@"',
        "sh",
    ],
    "a full disk": [
        *("unshare", "--mount", "sh", "-c"),
        "cp -a study template && mount -t tmpfs -o size=2400k none study && "
        'cp -a template/* study && ! cat /dev/zero > study/fill && exec "$@"',
        "sh",
    ],
    "another's study": AS_A_STRANGER,
    "a container with an ASCII terminal": [
        *AS_A_STRANGER,
        *("env", "-i", "PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONUTF8=0"),
    ],
}
# What only reads works on any disk.
READS = (
    "version",
    "help",
    "status",
    "status of one",
    "json",
    "selection",
    "show",
    "report",
    "logs",
    "dry run",
    "inspect",
    "plan",
    "retry",
    "wait",
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished run and a data file."""
    folder = tmp_path_factory.mktemp("template")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(100, 4)))
    subprocess.run(
        [sys.executable, "-m", "flowjobs", "train", "--name", "a", *QUICK],
        check=True,
        cwd=folder,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return folder


def codes_of(prefix: Sequence[str], commands: dict[str, Sequence[str]]) -> dict[str, int]:
    """The exit codes of the commands, run after `prefix`."""
    runner = [sys.executable, "-c", RUNNER, json.dumps(commands), "codes.json"]
    done = subprocess.run(
        [*prefix, *runner], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert "Traceback" not in said, said
    assert "Logging error" not in said, said
    assert done.returncode == 0, said
    codes: dict[str, int] = json.loads(Path("codes.json").read_text())
    return codes


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting and other users need root")
@pytest.mark.parametrize(
    "place",
    [
        # What cannot be written is met on a read-only disk as well.
        pytest.param(place, marks=[] if "disk" in place else [pytest.mark.long])
        for place in PLACES
    ],
)
def test_no_command_ends_in_a_traceback(workplace: Path, template: Path, place: str) -> None:
    shutil.copytree(template, workplace, dirs_exist_ok=True)
    if place == "another's study":
        for path in (workplace / "study", *(workplace / "study").rglob("*")):
            os.chown(path, 12345, 12345)
    Path("codes.json").touch()
    before = tree(workplace / "study")
    codes = codes_of(PLACES[place], COMMANDS)
    if place in ("a read-only disk", "another's study"):
        assert tree(workplace / "study") == before
    assert codes.keys() == COMMANDS.keys()
    assert {name: codes[name] for name in READS} == dict.fromkeys(READS, 0)
    writes = ("submit", "train", "train on", "split", "sweep")
    usable = place.startswith("a container")
    assert codes["rm"] == (0 if usable or place == "a full disk" else 2)
    assert {name: codes[name] for name in writes} == dict.fromkeys(writes, 0 if usable else 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user needs root")
def test_what_may_not_be_entered_is_passed_over(
    workplace: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = "class Net(torch.nn.Module):\n    def __init__(self, dim): super().__init__()\n"
    (workplace / "my_models.py").write_text(f"import torch\n{net}")
    closed = workplace / "closed"
    closed.mkdir(mode=0)
    # Root's, in a container that runs as another user; and a colleague's.
    monkeypatch.setenv("HOME", str(closed))
    monkeypatch.delenv("XDG_CONFIG_HOME")
    path = [str(closed / "lib"), str(closed), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    dry_run = ["submit", "--dry-run", "--cluster", "local", "--arch", "my_models:Net"]
    for folder, words in ((workplace, dry_run), (closed, ["status", "--study", str(study)])):
        command = [*AS_A_STRANGER, sys.executable, "-m", "flowjobs", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def half_copied(study: Path) -> dict[str, Path]:
    """A study in which each run lacks another part, as where a copy was broken off."""
    whole, weights = study / "runs/a", study / "checkpoints/a"
    lacks = {
        "config": (whole / "config.json", 300),
        "status": (whole / "status.json", 100),
        "no-status": (whole / "status.json", None),
        "jobs": (whole / "jobs.jsonl", 20),
        "rows": (whole / "metrics.jsonl", 200),
        "identity": (whole / "run.json", 10),
        "measures": (whole / "evaluation.json", 50),
        "weights": (weights / "best.pt", 1000),
        "no-weights": (weights / "best.pt", None),
    }
    for name, (file, kept) in lacks.items():
        shutil.copytree(whole, study / "runs" / name)
        shutil.copytree(weights, study / "checkpoints" / name)
        copy = study / file.parents[1].name / name / file.name
        content = copy.read_bytes()[:kept] if copy.exists() else b"{"
        copy.unlink(missing_ok=True)
        if kept is not None:
            copy.write_bytes(content)
    return {name: study / "runs" / name for name in lacks}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_who_looks_at_a_half_copied_study_gets_an_answer_and_changes_nothing(
    workplace: Path, template: Path, study: Path
) -> None:
    shutil.copytree(template, workplace, dirs_exist_ok=True)
    runs = half_copied(study)
    (study / "sweeps").mkdir()
    (study / "sweeps/all.toml").write_text("[base]\narch_args.width = 8\n[grid]\nseed = [0]\n")
    (study / "sweeps/all.runs").write_text("\n".join([*runs, "never"]))
    before = tree(study)
    local = ("--cluster", "local")
    looks: dict[str, Sequence[str]] = {
        "status": ["status"],
        "json": ["status", "all", "--json"],
        "fields": ["status", "seed=0"],
        "report": ["report"],
        "csv": ["report", "all", "--csv"],
        "plan": ["sweep", "all", *local, "--dry-run"],
        "retry": ["retry", "all", *local, "--dry-run"],
        "wait": ["wait", "all"],
        "failed": ["logs", "--failed"],
        "rm": ["rm", "all"],  # nobody is there to ask
        **{f"show {name}": ["show", name] for name in runs},
        "logs identity": ["logs", "identity"],
        "report measures": ["report", "measures"],
        "report no-weights": ["report", "no-weights"],
    }
    codes = codes_of([], looks)
    assert set(codes.values()) <= {0, 1, 2}
    assert tree(study) == before
    assert codes["wait"] == codes["rm"] == 2
    assert (codes["status"], codes["json"], codes["plan"]) == (0, 0, 0)
    assert codes["show config"] == codes["show status"] == codes["report measures"] == 2
    assert codes["show rows"] == codes["logs identity"] == codes["report no-weights"] == 0


def test_one_broken_run_does_not_hide_the_others(
    flowjobs: Command, workplace: Path, template: Path
) -> None:
    shutil.copytree(template, workplace, dirs_exist_ok=True)
    runs = workplace / "study/runs"
    broken = {
        "no-json": ("config.json", b"{"),
        "no-object": ("config.json", b"[]"),
        "wrong-type": ("config.json", b'{"training": {"lr": "fast"}}'),
        "status": ("status.json", b'{"state": 5, "attempts": []}'),
        "time": ("status.json", b'{"updated": "x", "attempts": [{"number": "one"}]}'),
        "jobs": ("jobs.jsonl", b"\xff\xfe\n{}\n[1]\n"),
        "rows": ("metrics.jsonl", b'\xff\n{"step": "x"}\n{"step": 5, "val/loss": "low"}\n'),
    }
    for name, (file, content) in broken.items():
        shutil.copytree(runs / "a", runs / name)
        (runs / name / file).write_bytes(content)
    (runs / "lost").mkdir()
    shutil.copy(runs / "a/status.json", runs / "lost")
    done = flowjobs("status", "--json")
    states = {run["run"]: run["state"] for run in json.loads(done.stdout)}
    unknown = ("no-json", "no-object", "wrong-type", "status", "time", "lost")
    assert states == {"a": "finished", "jobs": "finished", "rows": "finished"} | dict.fromkeys(
        unknown, "unknown"
    )
    for name in unknown:
        assert f"error: {name}: {runs / name}" in done.stderr
    assert f"{runs / 'jobs'}/jobs.jsonl: 3 lines are damaged" in done.stderr
    each = {f"{verb} {name}": [verb, name] for name in broken for verb in ("status", "logs")}
    codes = codes_of([], {"status": ["status"], "reconcile": ["reconcile"], **each})
    assert codes["status"] == 0
    assert codes["reconcile"] == 2
    # What its jobs printed needs no config.
    assert (codes["status wrong-type"], codes["logs wrong-type"]) == (2, 0)


def test_paths_of_any_name(flowjobs: Command, workplace: Path, template: Path) -> None:
    folder = workplace / "50%x it's $x"
    folder.mkdir()
    shutil.copy(template / "x.npy", folder / "my data.npy")
    data, study = f"{folder.name}/../{folder.name}/my data.npy", f"{folder}/10%"
    options = ("--cluster", "local", "--name", "p", "--study", study, *QUICK)
    assert flowjobs("submit", *options, "--dataset", data).returncode == 0
    # The same file by another path is the same data.
    again = flowjobs("submit", *options, "--dataset", str(folder / "my data.npy"))
    assert "p is finished" in again.stdout, again.stderr
    assert flowjobs("logs", "p", "--study", study).returncode == 0
    batch_file = flowjobs("submit", "--dry-run", "--name", "q", "--study", study).stdout
    assert "/50%%x it'\"'\"'s $x/10%%/runs/q/logs/%j_0_log.out'" in batch_file
    done = flowjobs("submit", *options, "--study", "50%j")
    assert (done.returncode, "found %j, which stands for a job's id" in done.stderr) == (2, True)
    done = flowjobs("status", "--study", "new\nline")
    assert (done.returncode, "control character" in done.stderr) == (2, True)
