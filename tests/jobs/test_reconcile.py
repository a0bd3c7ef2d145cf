"""Runs whose job is gone silently, on the real Slurm: who finds out, and what they say."""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flowjobs.cli.main import run as run_command
from flowjobs.config import RestartConfig, RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.jobs.dead_jobs import DeadJob, find_dead_jobs
from flowjobs.jobs.origin import Origin
from flowjobs.jobs.reconcile import handle_job_end, handle_pack_end, reconcile
from flowjobs.jobs.record_end import record_dead_attempt
from flowjobs.jobs.run_stages import Stage, stages, stages_of
from flowjobs.runs.pack import new_pack
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, RunStatus, now
from flowjobs.runs.submittable import Submittable
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.jobs.disturbed import (
    OPTIONS,
    REPOSITORY,
    Disturbed,
    Start,
    assert_in_wandb,
    by_hand,
    in_wandb,
)


def kill_with_its_batch_shell(job: Disturbed) -> None:
    """Kills all of a job that could say a word; the batch script's last lines die too."""
    # Another cluster of the tests may have a job of this id, too.
    own = f"SLURM_JOB_ID={job.job_id}\0", f"SLURM_CONF={job.slurm.env['SLURM_CONF']}\0"
    scripts = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_text(errors="replace")
            # By hand, the shell has become the plumbing of the script.
            is_script = "slurm_script" in command or "flowjobs.cli.batch_script" in command
            environment = (process / "environ").read_text(errors="replace")
            if is_script and all(variable in environment for variable in own):
                os.kill(int(process.name), signal.SIGSTOP)
                scripts.append(int(process.name))
    job.kill(signal.SIGKILL)  # before Slurm sees the end of its script, and tells it to leave
    for pid in scripts:
        os.kill(pid, signal.SIGKILL)
    job.slurm.wait_state(job.job_id, "FAILED", 120)
    wait_until(
        lambda: [row["State"] for row in job.slurm.accounting(job.job_id)] == ["FAILED"],
        "accounting to know the job's end",
        120,
    )


def test_a_job_that_is_gone_with_its_batch_shell_is_closed_once(
    start: Start, flowjobs: Command
) -> None:
    job = start()
    kill_with_its_batch_shell(job)
    assert job.status().state == "running"  # nobody has said anything else yet
    done = flowjobs("reconcile")
    assert done.stdout.startswith("disturbed: failed: killed (SIGKILL) on n1, attempt 1, step")
    status = job.status()
    assert (status.state, status.exit_code) == ("failed", 137)
    ended = datetime.fromisoformat(job.slurm.job(job.job_id)["EndTime"]).astimezone(UTC)
    assert status.attempts[-1].ended == ended.isoformat()
    assert_in_wandb(job.run, "failed", 137, "killed (SIGKILL)")
    assert_in_wandb(job.run, "failed", 137, "> attempt 1 at disturbed")  # its log's last lines
    again = flowjobs("reconcile")
    assert (again.returncode, again.stdout) == (0, "")
    assert_in_wandb(job.run, "failed", 137, "killed (SIGKILL)")


@pytest.mark.long
def test_a_job_that_slurm_kills_at_its_limit_says_so(start: Start, flowjobs: Command) -> None:
    job = start("--timeout-min", "60", "--give-up-after", "1")
    job.limit(2)
    deadline = time.monotonic() + 600
    while job.slurm.job(job.job_id)["JobState"] in ("RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, job.explain()
        for _ in range(1000):  # Slurm wakes what it tells to end; it must hear nothing
            with contextlib.suppress(ProcessLookupError):
                job.kill(signal.SIGSTOP)
            time.sleep(0.0005)
    wait_until(
        lambda: [row["State"] for row in job.slurm.accounting(job.job_id)] == ["TIMEOUT"],
        "accounting to know the job's end",
        120,
    )
    assert flowjobs("reconcile").returncode == 0
    status = job.status()
    assert (status.state, status.attempts[-1].kind) == ("failed", "time limit")
    assert status.reason.startswith("killed at the time limit on n1, attempt 1, step")
    assert_in_wandb(job.run, "failed", 1, status.reason)


@pytest.mark.long
def test_two_at_once_close_a_job_once(start: Start) -> None:
    job = start()
    kill_with_its_batch_shell(job)
    command = [sys.executable, "-m", "flowjobs", "reconcile"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=600)[0] for process in both)
    assert said.count("disturbed: failed: killed (SIGKILL)") == said.count("\n") == 1
    assert job.attempts() == [("failed", "killed")]
    assert_in_wandb(job.run, "failed", 137, "killed (SIGKILL)")


def test_slurm_is_asked_once_for_all_runs(
    slurm: SlurmCluster, flowjobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for name in ("a", "b", "c"):
        done = flowjobs("submit", *OPTIONS, "--name", name, "--sbatch", "hold=True")
        assert done.returncode == 0, done.stderr
    counting = Path("bin").absolute()
    counting.mkdir()
    for name in ("squeue", "sacct", "scontrol"):
        script = f'#!/bin/sh\necho {name} >> {counting}/calls\nexec {shutil.which(name)} "$@"\n'
        (counting / name).write_text(script)
        (counting / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{counting}:{os.environ['PATH']}")
    assert flowjobs("reconcile").returncode == 0
    assert (counting / "calls").read_text() == "squeue\n"


def reconcile_from_cron(job: Disturbed) -> subprocess.CompletedProcess[str]:
    """In the root folder, with next to no environment, and with Slurm's own defaults."""
    return subprocess.run(
        [sys.executable, "-m", "flowjobs", "reconcile", "--study", str(job.run.study)],
        env={"PATH": "/usr/bin:/bin", **job.slurm.env},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_lost_job_is_started_again_as_it_was_submitted(start: Start) -> None:
    job = start("--retries", "1")
    kill_with_its_batch_shell(job)
    origin = job.run.origin_file(job.job_id)
    assert stat.S_IMODE(origin.stat().st_mode) == 0o600
    os.chown(origin, 65534, -1)
    done = reconcile_from_cron(job)
    assert f"job {job.job_id} was submitted by nobody" in done.stderr
    assert (job.status().state, len(job.job_ids())) == ("running", 1)
    # Nothing but `reconcile`, or submitting it, starts it again: so say both who look.
    assert stages_of([job.run], find_dead_jobs([job.run])) == {"to resume"}
    assert stages({job.run: job.run.config()})[job.run].stage == "to resume"
    os.chown(origin, os.getuid(), -1)
    assert "starts again" in reconcile_from_cron(job).stdout
    old, new = job.run.submissions()
    assert (old.job_id, new.continues) == (job.job_id, job.job_id)
    assert job.slurm.job(new.job_id)["ExcNodeList"] == "n1"
    job.wait_for_state("finished")
    assert_in_wandb(job.run, "finished", 0)


@pytest.mark.parametrize("shared", [False, True])
def test_a_lost_job_is_not_started_again_beside_one_that_was_submitted_since(
    slurm: SlurmCluster,
    study: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    shared: bool,
) -> None:
    caplog.set_level("INFO")
    run = Run(study, "a")
    run.create(RunConfig(restarts=RestartConfig(1), tracking=TrackingConfig("disabled")))
    first: Submittable = new_pack(study, "shared", [run], 1, run.asked()) if shared else run
    log = Path("job.out").absolute()
    lost = slurm.submit(f"--output={log}", "--wrap", "kill -9 $$")
    slurm.wait_state(lost, "FAILED", 60)
    since = slurm.submit("--hold", f"--output={log}", "--wrap", "true")
    for submitted, job_id in ((first, lost), (run, since)):
        Origin.here(run.asked()).note(submitted, job_id)
        submitted.add_submission(job_id, "slurm", log)
    job = JobInfo("slurm", lost, None, "n1", 1)
    RunStatus("running", attempts=[AttemptRecord(1, job, now())]).write(run.status_file)

    def reasons() -> list[str]:
        return slurm.run("squeue", "-h", "-o", "%r").split()

    wait_until(lambda: reasons() == ["JobHeldUser"], "the scheduler's look", 60)
    # That it waits is what there is to know of the run, before its end is noted as well.
    assert stages_of([run], find_dead_jobs([run])) == {"waiting"}
    assert run_command(["status", "a"]) == 0
    _, row, waits, ended, *_ = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["a", "waiting"]
    assert waits.startswith(f"a waits held by its user: `scontrol release {since}`")
    assert "preempted: killed (SIGKILL) on n1, attempt 1; starts again" in ended
    (found,) = reconcile([run])
    assert found.outcome is not None
    assert found.outcome.state == "preempted", found
    why = "is not continued" if shared else f"already has job {since} (pending)"
    assert f"{first.name} {why}" in caplog.text
    assert slurm.run("squeue", "-h", "-o", "%i").split() == [since]
    assert [entry.job_id for entry in run.submissions()] == [lost, since]


def test_a_job_that_waits_is_shown_unless_the_one_before_it_trains(
    slurm: SlurmCluster, site: Callable[[str, str], None], study: Path
) -> None:
    run = Run(study, "a")
    run.create(RunConfig(tracking=TrackingConfig("disabled")))
    before = slurm.submit("--output=/dev/null", "--wrap", "sleep 600")
    since = slurm.submit("--hold", "--output=/dev/null", "--wrap", "true")
    slurm.wait_state(before, "RUNNING")
    for job_id in (before, since):
        run.add_submission(job_id, "slurm", None)

    def stage_with_an_attempt_of(job_id: str) -> set[Stage]:
        job = JobInfo("slurm", job_id, None, "n1", 1)
        RunStatus("running", attempts=[AttemptRecord(1, job, now())]).write(run.status_file)
        return stages_of([run], find_dead_jobs([run]))

    assert stage_with_an_attempt_of(before) == {"running"}
    # As for hours, where its node hangs.
    site("squeue", '$real "$@" | sed s/RUNNING/COMPLETING/')
    assert stage_with_an_attempt_of(before) == {"waiting"}
    elsewhere = "999999"
    run.jobs_file.unlink()
    run.add_submission(elsewhere, "slurm", None, identity={"slurm_cluster": "other"})
    assert stage_with_an_attempt_of(elsewhere) == {"unknown"}
    run.add_submission(since, "slurm", None)
    assert stage_with_an_attempt_of(elsewhere) == {"waiting"}
    assert reconcile([run]) == []


@pytest.mark.long
def test_a_lost_job_by_hand_keeps_its_arguments_and_its_environment(
    slurm: SlurmCluster, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("PYTHON", sys.executable)
    arguments = (*OPTIONS, "--arch-args", "control=con 'trol", "--retries=1", "--name=disturbed")
    control = Path("con 'trol")
    control.write_text("await 10")
    job = by_hand(study, slurm, "train.sh", (*arguments, f"--study={study}"), "--mem=1G")
    kill_with_its_batch_shell(job)
    control.unlink()
    assert "starts again" in reconcile_from_cron(job).stdout
    _, new = job.run.submissions()
    record = slurm.job(new.job_id)
    assert (record["ExcNodeList"], record["MinMemoryNode"]) == ("n1", "1G")
    job.wait_for_state("finished")
    assert job.run.config().training.arch_args == {"control": "con 'trol"}


def test_where_it_cannot_be_started_again_wandb_is_told_all_the_same(
    slurm: SlurmCluster, site: Callable[[str, str], None], study: Path
) -> None:
    runs = alone, killed, waiting = [Run(study, name) for name in ("alone", "killed", "waiting")]
    for run in runs:
        tracking = TrackingConfig(wandb_mode="offline" if run == alone else "disabled")
        run.create(RunConfig(TrainingConfig(), tracking=tracking, restarts=RestartConfig(1)))
    pack = new_pack(study, "shared", [killed, waiting], 2, SlurmConfig())
    jobs = []
    for run, submitted in ((alone, alone), (killed, pack)):
        job_id = slurm.submit("--hold", "--output=job.out", "--wrap", "true")
        submitted.add_submission(job_id, "slurm", None)
        job = JobInfo("slurm", job_id, None, "n1", 1)
        RunStatus("running", attempts=[AttemptRecord(1, job, now())]).write(run.status_file)
        jobs.append(job)
    # Nor as a new job: nobody knows what these were submitted from.
    site("scontrol", '[ "$1" = requeue ] && exit 1; $real "$@"')
    assert handle_job_end(alone, jobs[0], 137) is not None
    assert in_wandb(alone).state == "preempted"
    assert [*handle_pack_end(pack, jobs[1], 137)] == [killed]


def test_a_job_whose_import_fails_is_failed_with_the_reason(
    slurm: SlurmCluster, flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path("broken")
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    path = os.pathsep.join([str(broken.absolute()), str(REPOSITORY)])
    monkeypatch.setenv("PYTHONPATH", path)
    done = flowjobs("submit", *OPTIONS, "--name", "broken")
    assert done.returncode == 0, done.stderr
    run = Run(study, "broken")
    job_id = run.submissions()[0].job_id
    assert slurm.wait_state(job_id, {"FAILED", "COMPLETED"}, 240) == "FAILED"
    status = run.status()
    assert status.state == "failed"
    assert re.fullmatch(
        r"ImportError \(.*broken/torch.py, line 1\): libcudart.so.12: cannot open", status.reason
    )
    assert_in_wandb(run, "failed", 1, "libcudart.so.12: cannot open")
    assert flowjobs("reconcile").stdout == ""


@pytest.mark.long
def test_a_job_whose_srun_finds_the_controller_away_starts_again(
    slurm: SlurmCluster,
    flowjobs: Command,
    study: Path,
    site: Callable[[str, str], None],
) -> None:
    # Its batch script runs, and the controller restarts.
    away = "sed 's/^SlurmctldPort=.*/SlurmctldPort=1/' $SLURM_CONF > away.conf"
    once = f"[ -e away.conf ] || {{ {away}; export SLURM_CONF=$PWD/away.conf; }}"
    site("srun", f'{once}; exec $real "$@"')
    done = flowjobs("submit", *OPTIONS[2:4], "--arch=mlp", "--epochs=1", "--name=away")
    assert done.returncode == 0, done.stderr
    run = Run(study, "away")
    job = Disturbed(run, run.submissions()[0].job_id, slurm)
    job.wait_for_state("finished", "failed")
    assert job.attempts() == [("preempted", "launch failed"), ("finished", "")], job.explain()
    assert len(job.job_ids()) == 1
    assert "Unable to contact slurm controller" in job.status().attempts[0].reason


def test_a_job_that_cannot_start_at_all_is_failed_with_the_reason(
    slurm: SlurmCluster, flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path("broken")
    broken.mkdir()
    path = os.pathsep.join([str(broken.absolute()), str(REPOSITORY)])
    monkeypatch.setenv("PYTHONPATH", path)
    done = flowjobs("submit", *OPTIONS, "--name", "broken", "--sbatch", "hold=True")
    assert done.returncode == 0, done.stderr
    # Neither submitit on the node nor the last lines of the batch script come so far.
    (broken / "cloudpickle.py").write_text("raise ImportError('cannot open the environment')\n")
    run = Run(study, "broken")
    job_id = run.submissions()[0].job_id
    slurm.run("scontrol", "release", job_id)
    assert slurm.wait_state(job_id, {"FAILED", "COMPLETED"}, 240) == "FAILED"
    monkeypatch.delenv("PYTHONPATH")
    wait_until(lambda: "failed" in flowjobs("reconcile").stdout, "accounting to know", 120)
    status = run.status()
    assert status.state == "failed"
    said = f"job {job_id} ended before the run could start on n1: ImportError: cannot open"
    assert status.reason.startswith(said)
    assert status.attempts[0].kind == "never started"
    assert_in_wandb(run, "failed", 1, "cannot open the environment")
    assert flowjobs("reconcile").stdout == ""


def test_a_job_that_is_ended_before_its_run_could_start_is_started_again_by_its_cause(
    slurm: SlurmCluster, study: Path
) -> None:
    asked = RunConfig(tracking=TrackingConfig(wandb_mode="disabled"))
    runs = preempted, lost, retried = [Run(study, name) for name in ("preempted", "lost", "again")]
    jobs = []
    for run in runs:
        run.create(replace(asked, restarts=RestartConfig(1)) if run == retried else asked)
        # Its node is made ready, say, for some minutes.
        where = ("-p", "preempt-nograce", "-w", "n1") if run == preempted else ("-w", "n2")
        log = f"--output={run.logs}/%j_0_log.out"
        job_id = slurm.submit("--no-requeue", *where, "-J", run.name, log, "--wrap=sleep 600")
        identity = {"job_name": run.name}
        run.add_submission(job_id, "slurm", run.output_of(job_id), identity=identity)
        Origin.here().note(run, job_id)
        jobs.append(job_id)
    for job_id in jobs:
        slurm.wait_state(job_id, "RUNNING")
    slurm.preempt("n1")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    for job_id, state in zip(jobs, ("PREEMPTED", "NODE_FAIL", "NODE_FAIL"), strict=True):
        slurm.wait_state(job_id, state)
    ended = {}
    for run, dead in find_dead_jobs(runs).items():
        assert isinstance(dead, DeadJob), dead
        outcome = record_dead_attempt(run, dead)
        assert outcome is not None
        ended[run] = outcome.state, outcome.kind
    assert ended == {
        preempted: ("preempted", "preempted"),
        lost: ("failed", "node failure"),
        retried: ("preempted", "node failure"),
    }
    said = f"job {jobs[0]} ended before the run could start on n1: killed while it was preempted"
    assert preempted.status().reason == said


def test_a_job_that_is_cancelled_while_it_waits_is_cancelled_not_failed(
    slurm: SlurmCluster, flowjobs: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    done = flowjobs("submit", *OPTIONS, "--name", "waiting", "--sbatch", "hold=True")
    assert done.returncode == 0, done.stderr
    run = Run(study, "waiting")
    job_id = run.submissions()[0].job_id
    assert flowjobs("reconcile").stdout == ""
    slurm.run("scancel", job_id)
    # The controller knows at once; accounting some seconds later.
    assert "was cancelled before it started" in flowjobs("reconcile").stdout
    status = run.status()
    assert status.state == "cancelled"
    assert_in_wandb(run, "preempted", 130, "was cancelled before it started")


def test_without_slurm_reconcile_changes_nothing_and_says_so(
    start: Start, flowjobs: Command
) -> None:
    job = start()
    job.tell("hold")
    job.slurm.stop_controller()
    done = flowjobs("reconcile")
    assert done.returncode == 2
    assert "Slurm does not say which jobs there are" in done.stderr
    assert flowjobs("status").returncode == 0
    assert job.status().state == "running"
    job.slurm.start_controller()
    job.tell("")
    job.wait_for_state("finished")
