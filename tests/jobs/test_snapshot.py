"""A run keeps the code that it was submitted with, whatever its user edits meanwhile."""

import errno
import importlib
import logging
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.errors import ConfigError, RunMismatchError
from flowjobs.jobs import snapshot
from flowjobs.jobs.snapshot import CodeChoice, plan_code
from flowjobs.runs.code import (
    Code,
    code_of,
    digest_of,
    import_from_snapshot,
    read_snapshot,
    write_snapshot,
)
from flowjobs.runs.run import Run
from flowjobs.runs.surroundings import git_commit
from flowjobs.slurm import client
from flowjobs.tracking.page import config_for_wandb
from flowjobs.user_code import user_place
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.jobs.disturbed import (
    OPTIONS,
    REPOSITORY,
    Disturbed,
    assert_equal_to,
    by_hand,
    preempt_and_wait,
)

TRAINING = TrainingConfig(arch="own.nets:Net")
OWN = {"own/__init__.py": "", "own/nets.py": "from . import blocks\n", "own/blocks.py": "SCALE = 1"}

OWN_NET = ("--arch", "nets:Net", "--epochs", "2")
MODEL = """
from blocks import SCALE
from tests.jobs.slow_model import SlowModel

class Net(SlowModel):
    def forward(self, x, t):
        return SCALE * super().forward(x, t)
"""


def write(files: dict[str, str]) -> None:
    for path, text in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)


def git(*arguments: str) -> None:
    who = ("-c", "user.name=me", "-c", "user.email=me@lab")
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def run(study: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that is submitted from the working directory, which holds a model."""
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
    write(OWN)
    run = Run(study, "net")
    run.create(RunConfig(TRAINING))
    return run


def submit(run: Run, choice: CodeChoice = "ask") -> Code:
    """Keeps the code as a submission does, and lets the run train a step."""
    plan_code(run, TRAINING, choice).carry_out()
    run.last.write_bytes(b"")
    code = code_of(run)
    assert code is not None
    return code


def kept(run: Run) -> dict[str, bytes]:
    code = code_of(run)
    assert code is not None
    return read_snapshot(run.study, code.digest)


def test_what_git_tracks_or_would_track_is_kept_and_what_is_imported(run: Run) -> None:
    git("init")
    write({".gitignore": "ignored*\nown/made.py\nstudy2/", "untracked.py": "", "ignored.py": ""})
    write(
        {"own/blocks.py": "import own.made\nopen('sizes.npy')", "own/made.py": "", "notes.md": ""}
    )
    write({"own/sizes.npy": "1", "settings.json": "{}", "data.json": "[]", "removed.py": ""})
    write({"flowjobs/__init__.py": "", "study/x.py": "", "lib/site-packages/torch.py": ""})
    git("add", "own", "settings.json", "removed.py")
    Path("removed.py").unlink()
    submit(run)
    # Generated modules are ignored by git, and a package cannot be imported without them.
    imported = ["own/__init__.py", "own/blocks.py", "own/made.py", "own/nets.py", "own/sizes.npy"]
    assert sorted(kept(run)) == [*imported, "settings.json", "untracked.py"]


def test_a_slow_git_is_told_of_and_names_of_files_are_any_bytes(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    git("init")
    git("config", "core.quotePath", "false")
    Path(os.fsdecode(b"gr\xf6\xdfe.py")).write_text("1")
    git("add", ".")
    git("commit", "-m", "all")
    Path(os.fsdecode(b"gr\xf6\xdfe.py")).write_text("2")
    assert git_commit(Path())[1] is True
    monkeypatch.setattr(client, "SAY_AFTER_S", 0.05)
    slow = tmp_path / "git"
    told = tmp_path / "told"
    wait = f'[ "$3" != ls-files ] || until [ -e {told} ]; do sleep 0.05; done'
    slow.write_text(f'#!/bin/sh\n{wait}\nexec {shutil.which("git")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = f"git ls-files in {Path().absolute()} has not answered yet; waiting up to 60 s"

    def go_on(record: logging.LogRecord) -> bool:
        if record.getMessage() == said:
            told.touch()
        return True

    monkeypatch.setattr(client.logger, "filters", [go_on])
    plan_code(run, TRAINING)
    wait_until(lambda: said in caplog.messages, "its words", 60)


def test_without_a_repository_the_module_and_its_neighbours_are_kept(run: Run) -> None:
    write({"own/deep/other.py": "", "elsewhere/a.py": "", "own/data.bin": "", "imported.py": ""})
    write({"own/blocks.py": "import importlib\nimportlib.import_module('imported')"})
    code = submit(run)
    assert sorted(kept(run)) == [
        *("imported.py", "own/__init__.py", "own/blocks.py", "own/deep/other.py", "own/nets.py")
    ]
    assert (code.git_commit, code.git_dirty) == (None, None)


def test_a_run_of_built_in_parts_keeps_nothing_and_asks_nobody(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    plan_code(run, TrainingConfig()).carry_out()
    assert code_of(run) is None
    assert not (run.study / "code").exists()


def test_changed_code_is_listed_and_a_person_says_which_one_is_meant(run: Run) -> None:
    first = submit(run)
    write({"own/blocks.py": "SCALE = 2", "own/nets.py": "from . import blocks, more\n"})
    write({"own/more.py": ""})
    with pytest.raises(RunMismatchError) as refused:
        plan_code(run, TRAINING)
    head, *lines = str(refused.value).splitlines()
    assert head == "the code of net has changed since it was submitted:"
    assert lines[:3] == ["  own/blocks.py: changed", "  own/more.py: new", "  own/nets.py: changed"]
    assert lines[3].startswith("--keep-code resumes with the code that it has (")
    assert submit(run, "keep") == first
    resumed = plan_code(run, TRAINING, "submitted")  # by name, from wherever
    changed = "own/blocks.py, own/more.py, own/nets.py"
    assert resumed.note == (
        f"net keeps its code; changed since: {changed} (--new-code resumes with that)"
    )
    assert (resumed.code, resumed.forget, code_of(run)) == (None, False, first)
    second = submit(run, "new")
    assert second.earlier == (first.digest,)
    assert kept(run)["own/blocks.py"] == b"SCALE = 2"
    shutil.rmtree("own")
    with pytest.raises(RunMismatchError, match="cannot be compared: no source of"):
        plan_code(run, TRAINING)


def test_what_the_model_does_not_import_may_change(run: Run) -> None:
    write({"own/plot.py": "1", "own/nets.py": "from .blocks import SCALE"})
    first = submit(run)
    write({"own/plot.py": "2"})
    said = plan_code(run, TRAINING).note
    assert said == "net keeps its code; it imports nothing of own/plot.py (changed)"
    assert submit(run) == first


def test_a_run_without_a_step_takes_over_the_code_unless_a_job_waits(run: Run) -> None:
    first = submit(run)
    run.last.unlink()
    write({"own/blocks.py": "SCALE = 2"})
    with pytest.raises(RunMismatchError):
        plan_code(run, TRAINING, in_use=True)
    assert submit(run) != first


def test_without_a_snapshot_nothing_is_kept(run: Run) -> None:
    submit(run)
    plan_code(run, TRAINING, "live").carry_out()
    assert code_of(run) is None
    assert not run.code_diff_file.exists()


def test_the_commit_and_what_it_lacks_go_to_wandb(run: Run) -> None:
    git("init")
    git("add", "own")
    git("commit", "-m", "all")
    clean = submit(run)
    assert (len(clean.git_commit or ""), clean.git_dirty) == (40, False)
    write({"own/blocks.py": "SCALE = 2"})
    dirty = submit(run, "new")
    told = config_for_wandb(run)
    assert told["code"] == dirty.digest
    assert (told["git_commit"], told["git_dirty"]) == (clean.git_commit, True)
    assert "+SCALE = 2" in told["git_diff"]
    git("commit", "-am", "more")
    write({"own/new.py": "", "own/blocks.py": "from . import new"})
    git("checkout", "own/blocks.py")
    assert submit(run, "new").git_dirty is False  # nothing imports the file that git does not know
    assert told["code_earlier"] == [clean.digest]


def test_what_is_too_large_is_left_out_and_said_but_for_what_is_imported(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "FILE_LIMIT_MB", 0.001)
    monkeypatch.setattr(snapshot, "TOTAL_LIMIT_MB", 0.0035)
    write({"own/blocks.py": "#" * 2000, "own/large.py": "#" * 1100})
    write({"own/a.py": "#" * 900, "own/b.py": "#" * 901})
    plan = plan_code(run, TRAINING)
    assert sorted(plan.files) == ["own/__init__.py", "own/a.py", "own/blocks.py", "own/nets.py"]
    assert "without own/b.py (0.0 MB), own/large.py (0.0 MB): too large" in plan.note


def test_what_git_tracks_is_code_whatever_it_is_called(tmp_path: Path) -> None:
    files = {"m.py": b"", ".ipynb_checkpoints/m.py": b""}
    write_snapshot(tmp_path, files)
    assert read_snapshot(tmp_path, digest_of(files)) == files


def test_a_file_system_that_has_no_modes_keeps_code_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)  # as CIFS and FUSE may
    write_snapshot(tmp_path, {"m.py": b"1"})
    assert read_snapshot(tmp_path, digest_of({"m.py": b"1"})) == {"m.py": b"1"}


def test_two_at_once_keep_one_snapshot_whole(tmp_path: Path) -> None:
    files = {f"{number}.py": b"x" * 1000 for number in range(50)}
    together = threading.Barrier(4)

    def keep() -> None:
        together.wait()
        write_snapshot(tmp_path, files)

    threads = [threading.Thread(target=keep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (only,) = (tmp_path / "code").iterdir()
    assert read_snapshot(tmp_path, only.name) == files


def test_a_study_that_was_moved_finds_its_code_and_a_changed_one_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = submit(run)
    run.study.rename("moved")
    write({"own/blocks.py": "SCALE = 2"})
    moved = replace(run, study=Path("moved").absolute())
    import_from_snapshot(moved)
    assert sys.path[0] == str(moved.study / "code" / code.digest)
    file = moved.study / "code" / code.digest / "own" / "blocks.py"
    assert not file.stat().st_mode & 0o222
    # What Finder and Jupyter leave where somebody has looked.
    left = ".DS_Store", "own/._blocks.py", "own/.ipynb_checkpoints/blocks-checkpoint.py"
    for name in left:
        other = moved.study / "code" / code.digest / name
        other.parent.mkdir(exist_ok=True)
        other.touch()
    import_from_snapshot(moved)
    file.chmod(0o644)
    file.write_text("SCALE = 3")
    with pytest.raises(ConfigError, match="the run's code was changed in"):
        import_from_snapshot(moved)
    shutil.rmtree(moved.study / "code")
    with pytest.raises(ConfigError, match="the run's code is gone"):
        import_from_snapshot(moved)


def test_the_file_that_its_user_edits_is_named_not_its_copy(
    study: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    git("init")
    library = tmp_path_factory.mktemp("library")
    fails = "def f():\n    raise ValueError(1)\n"
    write({"experiments/nets.py": f"from mylib.blocks import f as g\n{fails}"})
    write({str(library / "mylib/blocks.py"): fails})
    monkeypatch.chdir("experiments")  # it is submitted from here, below the repository's root
    monkeypatch.setattr(sys, "path", [os.getcwd(), str(library), *sys.path])
    run = Run(study, "net")
    training = TrainingConfig(arch="nets:Net")
    run.create(RunConfig(training))
    plan_code(run, training).carry_out()
    import_from_snapshot(run)
    nets = importlib.import_module("nets")
    places = {nets.f: "nets.py, line 3, in f", nets.g: f"{library}/mylib/blocks.py, line 2, in f"}
    for failing, place in places.items():
        with pytest.raises(ValueError, match="1") as raised:
            failing()
        assert str(raised.traceback[-1].path).startswith(str(study))
        assert user_place(raised.value) == place
    run.last.touch()
    write({"nets.py": "from mylib import blocks", str(library / "mylib/blocks.py"): ""})
    sys.path[:] = [os.getcwd(), str(library), *sys.path]
    with pytest.raises(RunMismatchError) as refused:
        plan_code(run, training)
    assert f"\n  {library}/mylib/blocks.py: changed\n" in str(refused.value)
    assert "\n  nets.py: changed\n" in str(refused.value)
    for name in ("nets", "mylib", "mylib.blocks"):
        del sys.modules[name]


def test_flags_that_contradict_each_other_and_a_dry_run(flowjobs: Command, run: Run) -> None:
    both = flowjobs("submit", "--keep-code", "--no-snapshot")
    assert (both.returncode, both.stderr) == (
        2,
        "error: found --keep-code and --no-snapshot, expected one of them\n",
    )
    write({"own/nets.py": "from torch import nn\nclass Net(nn.Module): ..."})
    dry = flowjobs("submit", "--arch", TRAINING.arch, "--name", "dry", "--dry-run")
    assert "its code is kept: 3 files of" in dry.stdout
    assert not (run.study / "code").exists()


@pytest.fixture
def whole(flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose code nobody edits."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    write({"nets.py": MODEL, "blocks.py": "SCALE = 1.5"})
    done = flowjobs("train", *OPTIONS, *OWN_NET, "--name", "whole")
    assert done.returncode == 0, done.stderr
    return Run(study, "whole")


def test_a_run_ends_with_the_bits_of_the_code_that_it_was_submitted_with(
    whole: Run, slurm: SlurmCluster, flowjobs: Command
) -> None:
    Path("control").write_text("await 10")
    command = ("submit", *OPTIONS, *OWN_NET, "--name", "disturbed")
    site = ("--partition", "preempt", "--sbatch", "nodelist=n1", "hold=True")
    assert flowjobs(*command, *site).returncode == 0
    write({"blocks.py": "SCALE = 2.5"})
    run = Run(whole.study, "disturbed")
    job = Disturbed(run, run.submissions()[-1].job_id, slurm)
    slurm.run("scontrol", "release", job.job_id)
    job.wait_for_step(10)
    write({"nets.py": "this is no Python"})
    preempt_and_wait(job)
    assert job.wait_for_state("finished", "failed").state == "finished", job.explain()
    assert_equal_to(whole, run)
    assert len(job.attempts()) == 2
    kept = flowjobs(*command, *site, "--keep-code")
    assert "is finished" in kept.stdout, kept.stderr


@pytest.mark.long
def test_a_job_by_hand_resumes_with_the_code_that_it_began_with(
    whole: Run, slurm: SlurmCluster
) -> None:
    options = (*OPTIONS, *OWN_NET, "--name", "disturbed")
    place = (f"--chdir={Path.cwd()}", "--partition=preempt", "--nodelist=n1")
    Path(".venv").symlink_to(REPOSITORY / ".venv")
    job = by_hand(whole.study, slurm, "train.sh", options, *place)
    write({"blocks.py": "SCALE = 2.5", "nets.py": "this is no Python"})
    preempt_and_wait(job)
    assert job.wait_for_state("finished", "failed").state == "finished", job.explain()
    assert_equal_to(whole, job.run)
