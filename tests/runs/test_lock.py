"""One writer: who gets the lock of a run, from whom, and what the other one finds out."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from flowjobs.errors import RunBusyError, RunHolderUnknownError, RunTakenOverError
from flowjobs.runs import lock as lock_module
from flowjobs.runs.lock import Judge, RunLock, Verdict, lock_holder
from flowjobs.runs.process import process_lives, process_mark
from flowjobs.runs.status import JobInfo

JOB = JobInfo("slurm", "12", None, "n1", os.getpid())


def judge_that_says(verdict: Verdict) -> Judge:
    return lambda holder, lock_is_free: verdict


def hold_and_die(folder: Path) -> None:
    lock = RunLock(folder, JOB)
    lock.__enter__()
    os._exit(9)


def test_a_process_is_told_from_another_whatever_its_name_is_made_of(tmp_path: Path) -> None:
    program = os.fsencode(tmp_path / "gr") + b"\xf6\xdfe"
    os.symlink(sys.executable, program)
    with subprocess.Popen(
        [program, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as process:
        mark = process_mark(process.pid)
        assert mark is not None
        assert process_lives(process.pid, mark)
        assert not process_lives(process.pid, "another boot:1")


def test_a_killed_holder_does_not_block(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / ".lock-holder.json").exists()
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path, JOB) as lock:
        lock.check_held()


def test_who_lost_the_run_finds_out_and_frees_nothing(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path, JOB), RunLock(tmp_path, JOB, judge_that_says("gone"))
    first.__enter__()
    with second:
        assert not first.is_held()
        with pytest.raises(RunTakenOverError, match="taken over by slurm job 12 on n1"):
            first.check_held()
        first.__exit__(None, None, None)
        second.check_held()
        with pytest.raises(RunBusyError), RunLock(tmp_path, JOB):
            pass
    with RunLock(tmp_path, JOB):
        pass


def test_who_holds_a_run_does_not_hold_its_copy_and_a_run_that_is_gone_is_said_to_be(
    tmp_path: Path,
) -> None:
    there, copy = tmp_path / "there", tmp_path / "copy"
    there.mkdir()
    with RunLock(there, JOB) as lock:
        shutil.copytree(there, copy)
        assert lock_holder(there) is not None
        assert lock_holder(copy) is None
        with RunLock(copy, JOB, judge_that_says("alive")):
            pass
        there.rename(tmp_path / "moved")
        with pytest.raises(RunTakenOverError, match="is gone, moved or deleted"):
            lock.check_held()


def test_a_holder_whose_lock_is_not_seen_from_here_is_believed_to_live(tmp_path: Path) -> None:
    # A file system that knows no locks between nodes: the system's lock looks free.
    with RunLock(tmp_path, JOB):
        pass
    holder = {"cluster": "slurm", "job_id": "7", "log": None, "host": "n9", "pid": 1, "token": "x"}
    (tmp_path / ".lock-holder.json").write_text(json.dumps(holder))
    with (
        pytest.raises(RunBusyError, match="slurm job 7 on n9"),
        RunLock(tmp_path, JOB, judge_that_says("alive")),
    ):
        pass
    with RunLock(tmp_path, JOB, judge_that_says("gone")):
        pass


def test_a_process_of_another_host_whose_lock_is_not_seen_keeps_its_run_while_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "LEAVING_WAIT_S", 0.5)
    elsewhere = replace(JobInfo.in_foreground(), host="n9")
    lock = RunLock(tmp_path, elsewhere)
    lock.__enter__()
    assert lock._lock is not None
    lock._lock.release()
    metrics = tmp_path / "metrics.jsonl"
    metrics.touch()
    os.utime(metrics, (time.time() + 3600,) * 2)  # stays new for that long
    here = RunLock(tmp_path, JobInfo.in_foreground())
    with pytest.raises(RunHolderUnknownError, match="on n9, which may not have ended"), here:
        pass
    assert lock_holder(tmp_path) == elsewhere.description
    os.utime(metrics, (0, 0))
    assert lock_holder(tmp_path) is None
    with here:
        assert not lock.is_held()


def test_a_holder_that_leaves_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "LEAVING_WAIT_S", 1.5)
    leaving = RunLock(tmp_path, JOB)
    leaving.__enter__()
    told_at = time.monotonic()
    with pytest.raises(RunBusyError), RunLock(tmp_path, JOB, judge_that_says("leaving")):
        pass
    assert time.monotonic() - told_at > 1.4

    def judge(holder: JobInfo, lock_is_free: bool) -> Verdict:
        leaving.__exit__(None, None, None)  # it leaves while it is being asked about
        return "leaving"

    monkeypatch.setattr(lock_module, "LEAVING_WAIT_S", 600.0)
    with RunLock(tmp_path, JOB, judge) as lock:
        lock.check_held()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting and other users need root")
@pytest.mark.parametrize(
    "prefix",
    [
        ["unshare", "--user", "--map-user=64123", "--map-group=64123"],
        [
            *("unshare", "--mount", "sh", "-c"),
            'mount --bind . . && mount -o remount,ro,bind . && cd "$PWD" && exec "$@"',
            "sh",
        ],
    ],
    ids=["another's run", "a read-only disk"],
)
def test_who_may_only_look_at_a_run_is_told_whether_it_is_held(
    workplace: Path, prefix: Sequence[str]
) -> None:
    look = "from flowjobs.runs.lock import *; print(lock_holder(Path()))"

    def holder() -> str:
        for path in (workplace, *workplace.iterdir()):
            os.chown(path, 12345, 12345)
        command = [*prefix, sys.executable, "-c", look]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    me = JobInfo.in_foreground()
    with RunLock(workplace, me):
        assert holder() == me.description
    with subprocess.Popen(["true"]) as dead:
        pass
    file = workplace / ".lock-holder.json"
    file.write_text(json.dumps(asdict(replace(me, pid=dead.pid, process=None))))
    assert holder() == "None"
    file.write_text(json.dumps(asdict(replace(me, host="another"))))
    assert holder() == f"process {me.pid} on another"


def test_a_holder_file_of_another_version_is_no_obstacle(tmp_path: Path) -> None:
    for content in ("", "{", "[]", '{"cluster": "slurm"}', json.dumps({"token": 1, "new": 2})):
        (tmp_path / ".lock-holder.json").write_text(content)
        with RunLock(tmp_path, replace(JOB, job_id="13")) as lock:
            lock.check_held()
