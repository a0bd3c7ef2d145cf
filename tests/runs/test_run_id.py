"""A run's id: random, given once, kept where the run is moved, and not shared by copies."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flowjobs.config import RunConfig
from flowjobs.errors import ConfigError
from flowjobs.runs.lock import RunLock, lock_holder
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo


def make(study: Path, name: str = "a") -> Run:
    run = Run(study, name)
    run.create(RunConfig())
    return run


def test_a_run_that_was_deleted_and_submitted_again_is_another_one(study: Path) -> None:
    run = make(study)
    before = run.tracking_id()
    make(study)
    assert run.tracking_id() == run.ensure_tracking_id() == before
    run.last.write_text("weights alone do not make it the same run")
    shutil.rmtree(run.folder)
    assert make(study).tracking_id() != before


@pytest.mark.parametrize("copied", ["study", "folder"])
def test_a_copy_gets_an_id_of_its_own_and_the_original_keeps_its(study: Path, copied: str) -> None:
    run = make(study)
    before = run.tracking_id()
    if copied == "study":
        copies = [Run(study.parent / name, "a") for name in ("second", "third")]
        for copy in copies:
            shutil.copytree(study, copy.study, symlinks=True)
    else:
        copies = [Run(study, name) for name in ("b", "c")]
        for copy in copies:
            shutil.copytree(run.folder, copy.folder)
    assert {copy.tracking_id() for copy in copies} == {before}  # looking changes nothing
    ids = {each.ensure_tracking_id() for each in (*copies, run)}
    assert len(ids) == 3
    assert run.tracking_id() == before
    assert {each.ensure_tracking_id() for each in (*copies, run)} == ids
    # A copy of a copy is one too.
    again = Run(copies[0].study, "d")
    shutil.copytree(copies[0].folder, again.folder)
    assert again.ensure_tracking_id() not in ids


def moved(run: Run) -> Run:
    return Run(run.study.rename(run.study.with_name("moved")), run.name)


def moved_to_another_disk(run: Run) -> Run:
    there = Run(run.study.with_name("moved"), run.name)
    shutil.copytree(run.study, there.study)
    shutil.rmtree(run.study)
    return there


def renamed(run: Run) -> Run:
    run.folder.rename(run.folder.with_name("renamed"))
    return Run(run.study, "renamed")


def linked(run: Run) -> Run:
    link = run.study.with_name("link")
    link.symlink_to(run.study)
    return Run(link, run.name)


def restored_in_place(run: Run) -> Run:
    backup = run.folder.with_name("backup")
    shutil.copytree(run.folder, backup)
    shutil.rmtree(run.folder)
    backup.rename(run.folder)
    return run


def moved_where_another_took_its_place(run: Run) -> Run:
    there = moved(run)
    make(run.study)
    return there


@pytest.mark.parametrize(
    "happened",
    [
        moved,
        moved_to_another_disk,
        renamed,
        linked,
        restored_in_place,
        moved_where_another_took_its_place,
    ],
)
def test_a_run_that_is_no_copy_keeps_its_id(study: Path, happened: Callable[[Run], Run]) -> None:
    run = make(study)
    before = run.tracking_id()
    there = happened(run)
    assert there.ensure_tracking_id() == before
    # It is at home there: what is copied from there is a copy.
    copy = Run(there.study, "copy")
    shutil.copytree(there.folder, copy.folder)
    assert copy.ensure_tracking_id() != before
    assert there.ensure_tracking_id() == before


def test_a_folder_that_is_mounted_twice_is_one_run(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(study)
    before = run.tracking_id()
    run.add_submission("1", "slurm", None)
    export = study.with_name("export")
    export.symlink_to(study)
    again = Run(export, "a")
    with RunLock(run.folder, JobInfo("slurm", "1", None, "n1", 1)):
        # As where both mounts number the files of one file system differently.
        monkeypatch.setattr(
            os.path, "samefile", lambda one, other: os.path.abspath(one) == os.path.abspath(other)
        )
        assert lock_holder(again.folder, lambda holder, free: "alive") is not None
    assert len(again.submissions()) == 1
    files = sorted(run.folder.iterdir())
    assert {each.ensure_tracking_id() for each in (again, run, again)} == {before}
    assert sorted({*run.folder.iterdir()} - {*files}) == []


def test_a_copy_of_hard_links_has_none_of_the_jobs(study: Path) -> None:
    run = make(study)
    run.add_submission("1", "slurm", None)
    copied = study.with_name("copied")
    shutil.copytree(study, copied, copy_function=os.link)
    assert list(Run(copied, "a").submissions()) == []


def test_where_the_original_cannot_be_looked_at_the_id_is_kept(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make(study)
    copy = Run(study, "b")
    shutil.copytree(run.folder, copy.folder)
    (run.folder / "run.json").write_text("{")
    assert copy.ensure_tracking_id() == copy.tracking_id()
    assert "It keeps its id" in caplog.text
    with pytest.raises(ConfigError, match=r"run\.json is damaged .* delete it"):
        run.ensure_tracking_id()
    (run.folder / "run.json").unlink()
    assert run.ensure_tracking_id() != copy.tracking_id()
