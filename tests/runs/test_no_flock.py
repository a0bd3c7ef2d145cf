"""One writer where the file system has no locks: who is alive, who is dead, and who waits."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.runs.no_flock import no_flock

__all__ = ["no_flock"]

PRELUDE = """
import logging, sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from flowjobs.config import RunConfig
from flowjobs.errors import LockHeldError, RunBusyError
from flowjobs.runs import file_lock, lock, submittable
from flowjobs.runs.lock import RunLock, lock_holder
from flowjobs.runs.run import Run, undone_if_refused
from flowjobs.runs.status import JobInfo
from flowjobs.tracking import record
logging.basicConfig(format="%(message)s")
run = Run(Path("study").absolute(), "a")
"""
HOLDER = """
run.create(RunConfig())
with run.one_submits(), RunLock(run.folder, JobInfo.in_foreground()), record.upload_lock(run):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PRELUDE + HOLDER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def said_by(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return done.stdout


@pytest.mark.usefixtures("no_flock")
def test_without_locks_a_living_process_holds_the_run_and_a_killed_one_does_not(
    workplace: Path, flowjobs: Command
) -> None:
    with holder() as process:
        said = said_by("""
            import itertools
            from types import SimpleNamespace
            clock = itertools.count(0.0, 0.1)  # each look is a tenth of a second later
            file_lock.time = SimpleNamespace(monotonic=lambda: next(clock))
            file_lock.SAY_AFTER_S, record.UPLOAD_WAIT_S = 0.2, 1.0
            submittable.SUBMIT_WAIT_S = 0.5
            print("held by", lock_holder(run.folder))
            try:
                RunLock(run.folder, JobInfo.in_foreground()).__enter__()
            except RunBusyError as error:
                print("busy:", error, error.exit_code)
            try:
                record.upload_lock(run).__enter__()
            except LockHeldError as error:
                print("held:", error, error.exit_code)
            with run.one_submits():
                pass
        """)
        who = f"process {process.pid} on {os.uname().nodename}"
        assert f"held by {who}\n" in said
        assert f"{who}: wait for it, or cancel it first 2\n" in said
        assert f"waiting to upload a to W&B: .upload.lock is held by {who}\n" in said
        assert "held: waited 1 s to upload a to W&B" in said
        assert "or end that process if it hangs 75\n" in said
        assert said.endswith("or end that process if it hangs; submitting all the same\n")
        assert "Traceback" not in said

        process.send_signal(signal.SIGKILL)
        process.wait()
        said = said_by("""
            print("held by", lock_holder(run.folder))
            with run.one_submits():
                pass
            refused = Run(run.study, "refused")
            with suppress(LockHeldError), refused.one_submits(), undone_if_refused([refused]):
                raise LockHeldError("as sbatch may refuse it")
            print(refused.folder.exists())
            with RunLock(run.folder, JobInfo.in_foreground()) as mine, record.upload_lock(run):
                print(mine.is_held())
            run.create(RunConfig())
            # Its id may come again: after a reboot, or in the next container.
            before = replace(JobInfo.in_foreground(), process="an earlier boot:7")
            RunLock(run.folder, before).__enter__()
            print("held by", lock_holder(run.folder))
        """)
        assert said == "held by None\nFalse\nTrue\nheld by None\n"
    options = ("--epochs", "1", "--arch-args", "width=8", "depth=1", "--wandb-mode", "offline")
    done = flowjobs("train", *options, "--name", "b")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("no_flock")
def test_without_locks_a_process_elsewhere_is_waited_for_in_words_and_left_alone(
    workplace: Path,
) -> None:
    said = said_by("""
        run.create(RunConfig())
        elsewhere = JobInfo("none", "7", None, "n9", 7)
        RunLock(run.folder, elsewhere).__enter__()
        import time
        from types import SimpleNamespace
        from flowjobs.cli import main
        passed = [0.0]  # by a clock that only the pauses move
        lock.time = SimpleNamespace(
            monotonic=lambda: passed[0],
            sleep=lambda s: passed.__setitem__(0, passed[0] + s),
            time=time.time,
        )
        lock.SAY_AFTER_S, lock.LEAVING_WAIT_S = 0.3, 1.0
        main(["train", "--name", "a", "--wandb-mode", "disabled"])
    """)
    assert "waiting for process 7 on n9, up to 1 s" in said
    assert "error: waited 1 s for process 7 on n9, which may not have ended" in said
    assert ".lock-holder.json\n" in said  # what to delete, if it is known to be gone
    assert "Traceback" not in said
