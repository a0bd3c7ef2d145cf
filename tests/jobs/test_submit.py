"""Before a job is submitted, whether there is one; while it is, signals that end a command."""

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from flowjobs.cli.main import run as run_command
from flowjobs.config import RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import RunHolderUnknownError, SubmissionError
from flowjobs.field_values import KeyValues
from flowjobs.jobs import current_job, plain_sbatch
from flowjobs.jobs.cancel import cancel
from flowjobs.jobs.current_job import running_job, running_jobs
from flowjobs.jobs.dead_jobs import find_dead_jobs
from flowjobs.jobs.deferred_signals import signals_deferred
from flowjobs.jobs.origin import Origin
from flowjobs.jobs.restart import cancel_requested_with_retries, resubmit
from flowjobs.jobs.run_stages import stages, stages_of
from flowjobs.jobs.submit import submit
from flowjobs.jobs.tasks import task_of
from flowjobs.runs import file_lock, submittable
from flowjobs.runs.lock import RunLock
from flowjobs.runs.pack import new_pack
from flowjobs.runs.process import process_mark
from flowjobs.runs.run import Run, undone_if_refused
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, State, now
from flowjobs.slurm import sacct
from flowjobs.slurm.jobs import Unknown
from flowjobs.slurm.options import CONTINUES, SCRIPT_ARGUMENTS, SCRIPT_OUTPUT
from flowjobs.slurm.sacct import submit_line
from tests.cli.test_many import ended
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until


def test_ctrl_c_waits_whichever_thread_it_reaches() -> None:
    done = threading.Event()
    # A thread that does not block it, as that of a spinner.
    other = threading.Thread(target=done.wait)
    other.start()
    assert other.ident is not None
    noted = []

    def submit_and_signal(thread: int) -> None:
        with signals_deferred(), signals_deferred():
            signal.pthread_kill(thread, signal.SIGINT)
            done.wait(0.2)
            noted.append("the job")

    with pytest.raises(KeyboardInterrupt):
        submit_and_signal(other.ident)
    done.set()
    assert noted == ["the job"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_an_end_on_record_counts_although_an_older_job_is_unknown(
    study: Path, state: State
) -> None:
    run = ended(study, "a", Outcome(state, 1, kind=state))  # in job 7
    run.add_submission("5", "slurm", None, identity={"slurm_cluster": "other"})
    new_pack(study, "shared", [run], 1, run.asked()).add_submission("7", "slurm", None)
    assert running_job(run) is None
    run.add_submission("9", "slurm", None, identity={"slurm_cluster": "other"})
    with pytest.raises(SubmissionError, match="what became of job 9 of a is unknown"):
        running_job(run)


def test_a_job_by_hand_that_is_submitted_again_is_noted_before_ctrl_c_counts(
    slurm: SlurmCluster, site: Callable[[str, str], None], study: Path
) -> None:
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(epochs=1)))
    Path("job.sh").write_text("#!/bin/sh\n")
    Origin.here().note(run, "7")
    run.add_submission("7", "slurm", None, again=["sbatch", "--hold", "job.sh"])
    site("sbatch", '$real "$@"; kill -INT $PPID; sleep 1')
    with pytest.raises(KeyboardInterrupt):
        plain_sbatch.resubmit(run, run.submissions()[0], None)
    assert [run.submissions()[-1].job_id] == slurm.run("squeue", "-h", "-o", "%i").split()


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (
            (
                *("--no-requeue", "--exclusive", "--nice=5", "--mail-type=END,FAIL", "--tmp=1"),
                *("--mail-user=a@b", "--switches=1@5", "--time-min=5", "--signal=USR2@300"),
                "--hint=nomultithread",
            ),
            "--requeue --signal=USR2@90 --partition=preempt,gpu",
        ),
        (
            (
                *("--gpus=1", "--cpus-per-gpu=2", "--exclusive=user"),
                *("--error=job.err", "--time=UNLIMITED"),
            ),
            "--gpus-per-node=1 --time=9",
        ),
        (("--gpus-per-task=1", "--mem-per-gpu=1G", "--oversubscribe"), "--ntasks-per-node=1"),
    ],
)
def test_a_job_by_hand_that_is_submitted_again_keeps_its_options(
    slurm: SlurmCluster,
    site: Callable[[str, str], None],
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    gone: str,
) -> None:
    monkeypatch.setattr(sacct, "SUBMIT_LINE_WITHIN_S", 600.0)
    site("sbatch", 'echo "$@" >> commands; $real --hold "$@"')
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(epochs=1)))
    # Not UTF-8, which bash does not mind.
    Path("job.sh").write_bytes(f"#!/bin/sh\n#SBATCH {gone}\n# Gr".encode() + b"\xf6\xdfe\n")
    old = slurm.submit("--output=job.out", *options, "job.sh")
    site("scontrol", '$real "$@" | sed -E "s/=(preempt,gpu|gpu,preempt)/=gpu/"')  # as it runs
    log, output = (str(Path(name).absolute()) for name in ("job.err", "job.out"))
    if "--error=job.err" not in options:
        log, output = output, ""
    assert plain_sbatch.note_job(run, old) == log
    site("scontrol", 'exec $real "$@"')
    before = slurm.job(old)
    if "--signal=USR2@300" in options:  # which only accounting has, once the job is not held
        slurm.run("scontrol", "release", old)
        wait_until(lambda: submit_line(old), "accounting to know it", 60)
    after = slurm.job(plain_sbatch.resubmit(run, run.submissions()[0], None))
    assert [(entry.log, entry.job_log) for entry in run.submissions()] == [(log, output)] * 2
    commands = Path("commands").read_text().splitlines()
    for typed in ("--signal=USR2@300", "--hint=nomultithread"):
        assert [line.count(typed) for line in commands] == [typed in options] * 2
    own = ("JobId", "SubmitTime", "LastSchedEval", "Command", "Comment", "NumNodes")
    assert {**after, **dict.fromkeys(own)} == {**before, **dict.fromkeys(own)}


def test_a_job_by_hand_that_began_while_slurm_was_silent_is_known_all_the_same(
    slurm: SlurmCluster,
    site: Callable[[str, str], None],
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site("sbatch", '$real --hold "$@"')
    run = Run(study, "a")
    disabled = TrackingConfig(wandb_mode="disabled")
    run.create(RunConfig(TrainingConfig(epochs=1), tracking=disabled))
    Path("job.sh").write_text("#!/bin/sh\n")
    old = slurm.submit("--output=job.out", "--mem=1G", "job.sh", "--lr", "1")
    output = str(Path("job.out").absolute())
    # What it has of Slurm and of its batch script.
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "flowjobs")
    monkeypatch.setenv("SLURM_JOB_NAME", "job.sh")
    monkeypatch.setenv(SCRIPT_ARGUMENTS, json.dumps(["--lr", "1"]))
    monkeypatch.setenv(SCRIPT_OUTPUT, json.dumps([output, output]))
    site("scontrol", "exit 1")
    assert plain_sbatch.note_job(run, old) == output
    assert plain_sbatch.run_of_job(study, old, ["--lr", "1"]) == run
    assert plain_sbatch.run_of_job(study, old, ["--lr", "2"]) is None
    # What it was submitted with is asked when it is needed, and nothing else is submitted.
    job = JobInfo("slurm", old, output, "n1", 1)
    with pytest.raises(SubmissionError, match=f"Slurm says nothing of job {old}"):
        resubmit(run, job, task_of(run))
    site("scontrol", '[ "$1" = write ] && exit 1; exec $real "$@"')
    with pytest.raises(SubmissionError, match=r"not known.*: submit a again as you did"):
        resubmit(run, job, task_of(run))
    site("scontrol", 'exec $real "$@"')
    new = resubmit(run, job, task_of(run))
    assert slurm.job(new)["MinMemoryNode"] == "1G"
    assert run.submissions()[-1].again[-2:] == ["--lr", "1"]
    assert cancel(run) == f"a: cancelled job {old}, job {new}; submit it again to resume"


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_restart_has_the_umask_and_the_limits_of_the_submission(
    slurm: SlurmCluster, site: Callable[[str, str], None], study: Path, by_hand: bool
) -> None:
    # sbatch passes on what it finds of its own process.
    site("sbatch", 'echo "$(umask) $(ulimit -Sn)" >> inherited; exec $real "$@"')
    run = Run(study, "a")
    run.create(RunConfig(slurm=SlurmConfig(sbatch=KeyValues({"hold": True}))))
    own, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    umask = os.umask(0o002)
    try:
        if by_hand:
            Path("job.sh").write_text("#!/bin/sh\n")
            Origin.here().note(run, "7")
            run.add_submission("7", "slurm", None, again=["sbatch", "--hold", "job.sh"])
        else:
            submit(run, "slurm", task_of(run))
        (old, *_) = run.submissions()
        os.umask(0o077)
        resource.setrlimit(resource.RLIMIT_NOFILE, (own // 2, hard))
        resubmit(run, JobInfo("slurm", old.job_id, None, "n1", 1), task_of(run))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (own // 2, hard)
        assert os.umask(0o002) == 0o077
    finally:
        os.umask(umask)
        resource.setrlimit(resource.RLIMIT_NOFILE, (own, hard))
    assert {*Path("inherited").read_text().splitlines()} == {f"0002 {own}"}


def test_the_same_command_twice_at_once_submits_one_job(
    slurm: SlurmCluster,
    site: Callable[[str, str], None],
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    site("sbatch", 'touch asked; until [ -e go ]; do sleep 0.1; done; $real "$@"')
    command = ["submit", "--arch", "mlp", "--flow", "icfm", "--sbatch", "hold=True"]
    with subprocess.Popen([sys.executable, "-m", "flowjobs", *command]) as first:
        wait_until(Path("asked").exists, "the first to submit", 60)
        monkeypatch.setattr(file_lock, "SAY_AFTER_S", 0.2)

        def let_go(record: logging.LogRecord) -> bool:
            Path("go").touch()
            return True

        monkeypatch.setattr(file_lock.logger, "filters", [let_go])
        assert run_command(command) == 0
    run = Run(study, "mlp-icfm-digits-none")
    (job,) = run.submissions()
    assert slurm.run("squeue", "-h", "-o", "%i").split() == [job.job_id]
    who = f"process {first.pid}"
    assert f"waiting to submit {run.name}: .submit.lock is held by {who}" in caplog.text
    assert f"{run.name} already has job {job.job_id} (pending)" in capsys.readouterr().out


def test_a_submission_that_hangs_is_not_waited_for_for_ever_and_what_is_refused_leaves_no_lock(
    study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(submittable, "SUBMIT_WAIT_S", 0.1)
    run = Run(study, "a")
    with run.one_submits():
        with run.one_submits(), pytest.raises(SubmissionError), undone_if_refused([run]):
            raise SubmissionError("refused")
        assert "submitting all the same" in caplog.text
        assert not run.folder.exists()


def test_a_restart_goes_on_with_the_run_of_its_own_arguments(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(epochs=1)))
    run.add_submission("10", "slurm", None, again=["sbatch", "job.sh", "--name", "a"])
    (study / "runs" / "loop").symlink_to("loop")  # which nobody can look into
    monkeypatch.setenv(CONTINUES, "10")
    assert plain_sbatch.run_of_job(study, "20", ["--name", "a"]) == run
    # Submitted out of that job by a person: it has its variables alone.
    assert plain_sbatch.run_of_job(study, "20", ["--name", "b"]) is None


def test_the_job_of_an_open_attempt_counts_although_nobody_could_note_it(study: Path) -> None:
    run = ended(study, "a", Outcome("failed", 1))
    log = str(run.logs / "8_0_log.out")
    status = run.status()
    for job_log, unknown in ((log, True), (None, False)):
        status.attempts[-1] = AttemptRecord(1, JobInfo("slurm", "8", job_log, "n1", 1), now())
        status.write(run.status_file)
        assert isinstance(running_jobs([run]).get(run), SubmissionError) == unknown
        with pytest.raises(SubmissionError, match="job 8 was not") if unknown else nullcontext():
            cancel(run)


@pytest.mark.parametrize(
    ("kind", "noted", "busy"),
    [
        ("time limit", {}, True),  # between two starts
        ("told to leave", {}, False),
        ("time limit", {"process": "another boot:1"}, False),
        ("time limit", {"host": "elsewhere"}, False),
    ],
)
def test_a_local_job_without_the_lock_counts_as_long_as_it_lives(
    study: Path, kind: str, noted: dict[str, str], busy: bool
) -> None:
    run = ended(study, "a", Outcome("preempted", 75, kind=kind))
    status = run.status()
    pid = os.getpid()
    status.attempts[-1].job = JobInfo("local", str(pid), None, socket.gethostname(), pid)
    status.write(run.status_file)
    run.add_submission(str(pid), "local", None, identity={"process": process_mark(pid), **noted})
    assert (running_job(run) is not None) == busy
    assert stages({run: run.config()})[run].stage == ("waiting" if busy else "to resume")
    assert stages_of([run], find_dead_jobs([run])) == {"waiting" if busy else "to resume"}


def test_whether_a_job_of_another_host_starts_is_unknown_from_here(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig(TrainingConfig(epochs=1)))
    run.add_submission("7", "local", None, identity={"host": "elsewhere"})
    member = stages({run: run.config()})[run]
    assert (member.stage, "its job on elsewhere starts" in member.why) == ("unknown", True)
    assert stages_of([run], find_dead_jobs([run])) == {"unknown"}


def test_an_older_job_that_is_unknown_keeps_no_run_of_this_machine_from_being_cancelled(
    study: Path,
) -> None:
    run = ended(study, "a", Outcome("preempted", 75, kind="preempted"))
    run.add_submission("5", "slurm", None, identity={"slurm_cluster": "other"})
    run.add_submission("2", "local", None, identity={"process": "another boot:1"})
    assert "nothing will start it again" in cancel(run)


def test_what_an_older_job_of_its_id_has_done_says_nothing_of_a_new_one(study: Path) -> None:
    run = ended(study, "a", Outcome("failed", 1, kind="failed"))  # in job 7
    run.add_submission("7", "slurm", None, identity={"slurm_cluster": "other"})
    assert running_job(run) is None
    status = run.status()
    status.attempts[-1].started = status.attempts[-1].ended = "2025-01-01T00:00:00+00:00"
    status.write(run.status_file)
    # The controller has lost its state, or a machine has come round to the number of a process.
    with pytest.raises(SubmissionError, match="what became of job 7 of a is unknown"):
        running_job(run)
    assert isinstance(find_dead_jobs([run])[run], Unknown)
    pack = new_pack(study, "shared", [run], 1, run.asked())
    pack.add_submission("7", "slurm", None)
    assert pack.remaining("7") == [run]


def test_a_restart_asks_slurm_as_this_place_does_where_the_submission_s_settings_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JWT", "new")
    away = Origin("/", "python", {"SLURM_CONF": "/nonexistent", "A": "1"})
    assert away.environment_here() == {"A": "1", "SLURM_JWT": "new"}
    monkeypatch.setenv("SLURM_CONF", "/etc/hosts")
    assert away.environment_here()["SLURM_CONF"] == "/etc/hosts"
    there = Origin("/", "python", {"SLURM_CONF": "/etc/passwd"})
    assert there.environment_here()["SLURM_CONF"] == "/etc/passwd"


def test_train_waits_for_a_process_that_was_cancelled_before_it_clears_the_mark(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended(study, "a", Outcome("preempted", 75, kind="preempted"))
    run.request_cancel()
    train = [sys.executable, "-m", "flowjobs", "train", "--name", "a", "--wandb-mode", "disabled"]
    with (
        RunLock(run.folder, JobInfo.in_foreground()),
        subprocess.Popen([*train, "--epochs", "1"], stderr=subprocess.PIPE, text=True) as waiting,
    ):
        assert waiting.stderr is not None
        said = waiting.stderr.readline()
        waiting.kill()
        monkeypatch.setattr(current_job, "LEAVING_WAIT_S", 0.0)
        with pytest.raises(RunHolderUnknownError, match="cancelled and has not ended yet"):
            current_job.wait_until_ended(run)
    assert "waiting for process" in said
    assert run.cancel_requested()


def test_whether_a_run_is_cancelled_is_asked_until_it_can_be_read(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(study, "a")
    run.folder.mkdir(parents=True)
    run.cancel_file.symlink_to(run.cancel_file)  # as a file server that fails over has it
    monkeypatch.setattr(time, "sleep", lambda s: run.cancel_file.unlink())
    assert not cancel_requested_with_retries(run)
    run.cancel_file.symlink_to(run.cancel_file)
    monkeypatch.setattr("flowjobs.jobs.restart.AWAY_AT_MOST_S", -1.0)
    with pytest.raises(OSError, match="Too many levels"):
        cancel_requested_with_retries(run)
