"""The table of interruptions.md, row by row, on the real Slurm: what the run does when its job …

Each test disturbs a job of one small run, waits for the run's end, and holds its weights, EMA and
metrics against those of the same run left in peace, and what W&B has of it against what happened:
in offline files, and on a server with `-m long`.
"""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from flowjobs.runs.run import Run
from flowjobs.slurm.sacct import accounting
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.jobs import disturbed
from tests.jobs.disturbed import (
    DEADLINE_S,
    OPTIONS,
    REPOSITORY,
    Disturbed,
    Start,
    alive,
    assert_equal_to,
    assert_in_wandb,
    by_hand,
    in_wandb,
    preempt_and_wait,
)
from tests.jobs.test_job_identity import contents
from tests.tracking.conftest import backend

__all__ = ["backend"]

ON_N1 = ("--sbatch", "nodelist=n1")


@pytest.fixture(autouse=True, params=["offline", pytest.param("online", marks=pytest.mark.long)])
def tracked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "online":
        monkeypatch.setattr(disturbed, "server", request.getfixturevalue("backend"))
        monkeypatch.setenv("WANDB_MODE", "online")  # it wins over the option


def test_preempted_with_grace_and_user_signal(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt", *ON_N1)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert "SIGUSR2" in job.status().attempts[0].reason
    assert job.steps_lost() == 0
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)
    job.is_row("is preempted, with grace and the user signal")


@pytest.mark.long
def test_preempted_with_grace_and_term_only(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt", *ON_N1)
    job.slurm.set_user_signal(False)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert "SIGTERM" in job.status().attempts[0].reason
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)
    job.is_row("is preempted, with grace and TERM only")


def test_preempted_without_grace(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt-nograce", *ON_N1)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert [state for state, _ in job.attempts()] == ["preempted", "finished"]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)
    job.is_row("is preempted, without grace")


def test_requeued_by_hand(start: Start, whole: Run) -> None:
    job = start()
    job.slurm.run("scontrol", "requeue", job.job_id)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "requeued"), ("finished", "")]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)
    job.is_row("is requeued (`scontrol requeue`)")


def test_requeued_while_its_samples_are_measured(start: Start, whole: Run) -> None:
    job = start()
    held = Path(f"control-{job.status().attempts[0].job.pid}")
    wait_until(held.exists, "it to be held", DEADLINE_S)
    job.tell("sampling")
    job.wait_for_step(44)
    held.unlink()
    wait_until(held.exists, "its first sample", DEADLINE_S)
    job.slurm.run("scontrol", "requeue", job.job_id)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "requeued"), ("finished", "")]
    assert [of.first_step for of in job.status().attempts] == [0, 44]
    assert job.run.evaluation_file.exists()
    assert_equal_to(whole, job.run)
    job.is_row("is requeued while its samples are measured")


@pytest.mark.long
def test_a_signal_by_hand_is_not_taken_for_a_time_limit(start: Start, whole: Run) -> None:
    job = start()
    job.slurm.run("scancel", "--signal=USR2", f"{job.job_id}.0")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "told to leave"), ("finished", "")]
    assert job.steps_lost() == 0
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)


def test_the_time_limit_costs_nothing(start: Start, whole: Run) -> None:
    job = start("--timeout-min", "60")
    job.limit(2)  # 90 s before that it is told, or half a minute sooner
    job.slurm.wait_state(job.job_id, "PENDING")
    job.slurm.run("scontrol", "update", f"jobid={job.job_id}", "timelimit=60")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "time limit"), ("finished", "")]
    assert job.steps_lost() == 0
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)
    job.is_row("reaches its time limit")


def test_killed_by_sigkill_it_fails_and_goes_on_when_asked(
    start: Start, flowjobs: Command, whole: Run
) -> None:
    job = start()
    Path("flowjobs.toml").write_text("partition = ")  # somebody is just writing it
    job.kill(signal.SIGKILL)
    job.wait_for_state("failed")
    Path("flowjobs.toml").unlink()
    assert job.attempts() == [("failed", "killed")]
    assert "killed (SIGKILL) on n1, attempt 1, step" in job.status().reason
    assert job.slurm.wait_state(job.job_id, {"FAILED", "PENDING"}) == "FAILED"
    assert_in_wandb(job.run, "failed", 137, "killed (SIGKILL) on n1, attempt 1, step")
    job.is_row("has its python killed (SIGKILL)")
    assert flowjobs("submit", *OPTIONS, "--name", "disturbed").returncode == 0
    job.wait_for_state("finished")
    assert_equal_to(whole, job.run)


def test_killed_by_sigkill_it_is_retried_on_another_node(
    start: Start, whole: Run, study: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The folder that it was submitted from is gone by then: of another branch, say.
    branch = workplace / "branch"
    branch.mkdir()
    monkeypatch.setenv("FLOWJOBS_STUDY", str(study))
    monkeypatch.chdir(branch)
    job = start("--retries", "1")
    monkeypatch.chdir(workplace)
    job.kill(signal.SIGSTOP)  # without the file that tells it to wait it would go on
    shutil.rmtree(branch)
    job.kill(signal.SIGKILL)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "killed"), ("finished", "")]
    first, second = job.status().attempts
    assert first.job.host != second.job.host
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)
    job.is_row("has its python killed (SIGKILL), with `--retries 1`")


def test_a_segmentation_fault_fails(start: Start) -> None:
    job = start("--retries", "1")
    job.kill(signal.SIGSEGV)
    status = job.wait_for_state("failed")
    assert job.attempts() == [("failed", "segmentation fault")]
    assert status.exit_code == 139
    # As `status` finds it where the batch script could not say it.
    wait_until(lambda: accounting({job.job_id: 0})[0].signal == signal.SIGSEGV, "accounting", 120)
    assert job.slurm.wait_state(job.job_id, {"FAILED", "PENDING"}) == "FAILED"
    assert_in_wandb(job.run, "failed", 139, "segmentation fault on n1, attempt 1, step")
    job.is_row("has a segmentation fault")


def test_out_of_memory_is_named_with_its_figures(start: Start) -> None:
    job = start("--mem-gb", "2")
    job.tell("memory")
    status = job.wait_for_state("failed")
    assert job.attempts() == [("failed", "out of memory")]
    assert re.match(r"out of memory: \d\.\d+ of 2 GiB on n1, attempt 1, step \d+", status.reason)
    job.slurm.wait_state(job.job_id, "FAILED")
    assert_in_wandb(job.run, "failed", 137, status.reason)
    job.is_row("takes more memory than it asked for")


def test_an_exception_fails_and_is_not_repeated(start: Start) -> None:
    job = start("--retries", "3")
    job.tell("raise")
    status = job.wait_for_state("failed")
    assert re.fullmatch(
        r"ValueError \(.*slow_model.py, line \d+, in \w+\): the model was told to fail",
        status.reason,
    )
    assert status.exit_code == 1
    assert job.slurm.wait_state(job.job_id, {"FAILED", "PENDING"}) == "FAILED"
    assert len(job.attempts()) == 1
    assert_in_wandb(job.run, "failed", 1, "told to fail")
    job.is_row("raises an exception")


def test_an_exit_code_of_the_users_code_is_no_signal(start: Start) -> None:
    job = start("--retries", "1")
    job.tell("exit 15")
    job.wait_for_state("failed")
    assert job.attempts() == [("failed", "exception")]
    assert job.status().reason.startswith("ended with exit code 15 on")
    job.slurm.wait_state(job.job_id, "FAILED")
    wait_until(lambda: accounting({job.job_id: 0})[0].exit_code == 15, "accounting", 120)
    assert accounting({job.job_id: 0})[0].signal == 0


def test_a_file_system_error_is_retried_but_not_at_the_same_step(start: Start) -> None:
    job = start("--retries", "3")
    job.tell("file system")
    job.wait_for_state("failed")
    # Once it comes again at the step of the time before it is no passing one.
    *passing, last = job.status().attempts
    assert {(attempt.state, attempt.kind) for attempt in passing} == {("preempted", "file system")}
    assert (last.state, last.kind) == ("failed", "file system")
    assert last.last_step == passing[-1].last_step
    assert all(one.last_step != other.last_step for one, other in pairwise(passing))


def test_without_a_gpu_on_its_node_it_starts_on_another(start: Start, whole: Run) -> None:
    job = start(told="no GPU on n1")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "lost GPU"), ("finished", "")]
    first, second = job.status().attempts
    assert (first.job.host, first.first_step, second.job.host) == ("n1", None, "n2")
    assert "RuntimeError" in first.reason
    assert job.job_ids() == [job.job_id]
    assert_equal_to(whole, job.run)
    job.is_row("finds no GPU before its first step")


def test_a_lost_node_loses_only_what_was_not_saved(start: Start, whole: Run) -> None:
    job = start(*ON_N1, "--checkpoint-every-s", "1")
    job.slurm.kill_node("n1")
    job.tell("")
    job.slurm.mark_down("n1")
    job.slurm.start_node("n1")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "node failure"), ("finished", "")]
    assert_equal_to(whole, job.run)
    job.is_row("loses its node")


def test_a_process_that_lives_on_beside_its_rerun_writes_nothing_more(
    start: Start, whole: Run
) -> None:
    job = start()
    (first,) = job.status().attempts
    job.slurm.kill_slurmd(first.job.host)
    job.slurm.mark_down(first.job.host)
    job.tell("hold")  # so that both are alive at once
    job.wait_for_attempt(2)
    second = job.status().attempts[-1]
    assert second.job.host != first.job.host
    os.kill(first.job.pid, 0)  # it lives on
    job.tell("")
    job.wait_for_state("finished")
    wait_until(lambda: not alive(first.job.pid), "the first process to give up", 240)
    assert job.attempts() == [("preempted", "node failure"), ("finished", "")]
    assert_equal_to(whole, job.run)
    job.slurm.start_node(first.job.host)
    job.is_row("loses its slurmd alone, and lives on beside its rerun")


@pytest.mark.long
def test_a_restart_of_the_controller_is_not_noticed(start: Start, whole: Run) -> None:
    job = start()
    job.slurm.restart_controller()
    job.tell("")
    job.wait_for_state("finished")
    assert job.attempts() == [("finished", "")]
    assert_equal_to(whole, job.run)
    job.is_row("sees slurmctld restarted")


def test_a_controller_that_is_away_is_waited_for(start: Start, whole: Run) -> None:
    job = start()
    job.slurm.stop_controller()
    job.kill(signal.SIGUSR2)
    wait_until(lambda: "; waiting for it" in job.logs(), "it to ask in vain", 120, job.logs)
    assert job.status().state == "preempted"
    job.slurm.start_controller()
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)
    job.is_row("wants to requeue while slurmctld is away")


def test_scancel_ends_the_run_until_it_is_submitted_again(
    start: Start, flowjobs: Command, whole: Run
) -> None:
    job = start()
    job.slurm.run("scancel", job.job_id)
    job.wait_for_state("cancelled")
    assert job.slurm.wait_state(job.job_id, {"CANCELLED", "PENDING"}) == "CANCELLED"
    assert job.slurm.run("squeue", "-h") == ""
    assert_in_wandb(job.run, "preempted", 130, "cancelled by scancel")
    job.is_row("is cancelled by `scancel`")
    assert flowjobs("submit", *OPTIONS, "--name", "disturbed").returncode == 0
    job.wait_for_state("finished")
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_flowjobs_cancel_ends_the_run_until_it_is_submitted_again(
    start: Start, flowjobs: Command, whole: Run
) -> None:
    job = start(noted=False)
    (entry,) = job.run.submissions()
    assert job.slurm.job(job.job_id)["Comment"] == f"flowjobs:{entry.mark}"
    done = flowjobs("cancel", "disturbed")
    assert done.returncode == 0, done.stderr
    assert f"cancelled job {job.job_id};" in done.stdout
    job.wait_for_state("cancelled")
    # Not even if Slurm is told to start the job again.
    job.slurm.wait_state(job.job_id, "CANCELLED")
    job.slurm.run("scontrol", "requeue", job.job_id)
    job.hurry_while(lambda: "was cancelled: submit it again" in job.logs())
    assert job.status().state == "cancelled"
    assert_in_wandb(job.run, "preempted", 130, "cancelled by flowjobs cancel")
    job.is_row("is cancelled by `flowjobs cancel`")
    assert flowjobs("submit", *OPTIONS, "--name", "disturbed").returncode == 0
    job.wait_for_state("finished")
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


def test_cancelled_while_it_waits_to_start_again_it_does_not(
    start: Start, flowjobs: Command
) -> None:
    job = start()
    job.slurm.run("scontrol", "requeue", job.job_id)
    # Not hurried: it is not to start yet.
    wait_until(lambda: job.status().state == "preempted", "it to leave", DEADLINE_S, job.explain)
    job.slurm.wait_state(job.job_id, "PENDING", 240)
    job.slurm.run("scancel", job.job_id)
    before = contents(job.run.folder)
    shown = flowjobs("status", "disturbed")  # at once: accounting does not know yet
    assert "was cancelled before it started" in flowjobs("status", "disturbed", "--json").stdout
    assert " cancelled " in shown.stdout
    assert contents(job.run.folder) == before
    assert "disturbed: cancelled: job" in flowjobs("reconcile").stdout
    assert job.status().state == "cancelled"
    assert job.slurm.run("squeue", "-h") == ""
    assert job.job_ids() == [job.job_id]
    assert_in_wandb(job.run, "preempted", 130, "was cancelled before it started")
    job.is_row("is cancelled while it waits")


@pytest.mark.parametrize("moment", [pytest.param("imports", marks=pytest.mark.long), "first step"])
@pytest.mark.parametrize(
    "how", ["flowjobs cancel", pytest.param("scancel", marks=pytest.mark.long)]
)
def test_cancelled_as_it_starts_again_it_is_cancelled(
    start: Start, flowjobs: Command, whole: Run, moment: str, how: str
) -> None:
    job = start()
    job.slurm.run("scontrol", "requeue", job.job_id)
    # Not hurried: it is not to start yet.
    wait_until(lambda: job.status().state == "preempted", "it to leave", DEADLINE_S, job.explain)
    job.tell("hold")  # the first step of the next start takes longer than Slurm waits
    job.slurm.hurry(job.job_id, 60)
    if moment == "imports":
        job.slurm.wait_state(job.job_id, "RUNNING", 240)
    else:
        wait_until(lambda: job.status().attempts[-1].number == 2, "the start", 60, job.explain)
        wait_until(lambda: job.status().attempts[-1].first_step, "the step", 60, job.explain)
    if how == "scancel":
        job.slurm.run("scancel", job.job_id)
    else:
        assert flowjobs("cancel", "disturbed").returncode == 0
    job.slurm.wait_state(job.job_id, {"CANCELLED", "FAILED", "COMPLETED"}, 240)
    if how == "scancel" and moment == "imports":
        flowjobs("reconcile")  # all that could have said a word may have been killed
    assert job.wait_for_state("cancelled", "failed").state == "cancelled"
    assert flowjobs("reconcile").stdout == ""
    assert job.status().state == "cancelled"
    assert_in_wandb(job.run, "preempted", 130, "cancelled")
    job.is_row("is cancelled as it starts")
    job.tell("")
    assert flowjobs("submit", *OPTIONS, "--name", "disturbed").returncode == 0
    job.wait_for_state("finished")
    assert_equal_to(whole, job.run)


def test_where_the_partition_cancels_the_run_goes_on(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt-cancel", *ON_N1)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)
    job.is_row("is preempted where PreemptMode=CANCEL")


def test_where_requeuing_is_forbidden_the_run_goes_on_as_a_new_job(
    slurm: SlurmCluster, start: Start, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nodes may get Slurm's settings from the controller: the login node's file is not there.
    settings = Path("settings").absolute()
    shutil.copytree(Path(slurm.env["SLURM_CONF"]).parent, settings)
    with monkeypatch.context() as login:
        login.setenv("SLURM_CONF", str(settings / "slurm.conf"))
        job = start("--partition", "preempt", "--sbatch", "nodelist=n1", "no-requeue=True")
    shutil.rmtree(settings)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert job.steps_lost() == 0
    old, new = job.run.submissions()
    assert (old.job_id, new.continues) == (job.job_id, job.job_id)
    told = [attempt["job_id"] for attempt in in_wandb(job.run).config["attempts"]]
    assert told == job.job_ids()
    assert_equal_to(whole, job.run)
    job.is_row("is preempted where requeuing is forbidden (`--sbatch no-requeue=True`)")


def test_a_scancel_in_the_moment_of_the_requeue_still_ends_the_run(start: Start) -> None:
    job = start()
    # What the process finds when it asks is that it still runs; the scancel comes just after.
    job.tell("hold")
    job.slurm.run("scancel", job.job_id)
    job.slurm.run("scontrol", "requeue", job.job_id)
    job.tell("")
    wait = "was cancelled: submit it again"
    job.hurry_while(lambda: wait in job.logs())
    assert job.wait_for_state("cancelled", "running").state == "cancelled"


def test_a_step_that_never_ends_is_left_before_the_grace_is_over(start: Start, whole: Run) -> None:
    job = start("--partition", "preempt", "--checkpoint-every-s", "0.5", *ON_N1, step=20)
    job.tell("hold")
    time.sleep(1)
    other = job.slurm.preempt("n1")
    job.wait_for_state("preempted")
    assert_in_wandb(job.run, "preempted", 75, "no step ended in time")
    job.slurm.run("scancel", other)
    job.tell("")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "hung"), ("finished", "")]
    assert "told to leave, and no step ended in time" in job.logs()
    assert_equal_to(whole, job.run)


@pytest.fixture
def hand_made(start: Start, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The arguments of `train` for the run, with the environment that its job needs."""
    monkeypatch.setenv("PYTHON", sys.executable)
    return (*OPTIONS, "--name", "disturbed")


@pytest.mark.long
def test_a_job_by_hand_goes_on_as_a_new_job_where_requeuing_is_forbidden(
    hand_made: tuple[str, ...], study: Path, slurm: SlurmCluster, whole: Run
) -> None:
    where = ("-p", "preempt", "-w", "n1", "--no-requeue", "--mem=1G")
    job = by_hand(study, slurm, "train.sh", hand_made, *where)
    Path("flowjobs.toml").write_text("lr = 0.5\n")  # for the runs to come
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)
    old, new = job.run.submissions()
    assert new.continues == old.job_id == job.job_id
    record = slurm.job(new.job_id)
    assert (record["Partition"], record["ReqNodeList"]) == ("preempt", "n1")
    assert (record["MinMemoryNode"], record["TresPerNode"]) == ("1G", "gres:gpu:1")


def test_a_job_by_hand_that_waits_while_its_run_is_cancelled_does_not_start_it(
    hand_made: tuple[str, ...],
    study: Path,
    slurm: SlurmCluster,
    site: Callable[[str, str], None],
    flowjobs: Command,
) -> None:
    job = by_hand(study, slurm, "train.sh", hand_made)
    script = str(REPOSITORY / "sbatch" / "train.sh")
    # Of two ranks, and with a file for what is said.
    waiting = slurm.submit("--hold", "--nodes=2", "--error=%j.err", script, *hand_made)
    # Slurm's times are in whole seconds.
    second = int(time.time())
    wait_until(lambda: int(time.time()) > second, "the next second", 120)
    assert flowjobs("cancel", "disturbed").returncode == 0
    job.wait_for_state("cancelled")
    # On this home there is another cluster, which has had a job of the same id.
    job.run.add_submission(waiting, "slurm", None, identity={"slurm_cluster": "other"})
    for command in ("scontrol", "squeue"):  # which the site's nodes may not call
        site(command, '[ "$SLURM_JOB_ID" ] && exit 1; exec $real "$@"')
    slurm.run("scontrol", "release", waiting)
    slurm.wait_state(waiting, {"FAILED", "COMPLETED"}, 240)
    assert job.status().state == "cancelled"
    assert len(job.attempts()) == 1
    first, _, noted = job.run.submissions()  # by its first rank alone
    assert (noted.job_id, noted.slurm_cluster) == (waiting, first.slurm_cluster)
    log, output = (Path.cwd() / name for name in (f"{waiting}.err", f"flowjobs-{waiting}.out"))
    found = (noted.job_name, noted.log, noted.job_log)
    assert found == (first.job_name, str(log), str(output))
    assert "whether this job was submitted before that or since is unknown" in log.read_text()
    assert "resume disturbed` from where Slurm answers" in log.read_text()


@pytest.mark.long
def test_a_task_of_an_array_goes_on_like_a_job_of_its_own(
    hand_made: tuple[str, ...], study: Path, slurm: SlurmCluster, whole: Run
) -> None:
    other = " ".join((*OPTIONS, "--epochs", "1", "--name", "beside"))
    Path("runs.txt").write_text(f"{other}\n{' '.join(hand_made)}\n")
    where = ("--array=1-2", "-p", "preempt", "-w", "n1")
    job = by_hand(study, slurm, "array.sh", ("runs.txt",), *where)
    job.wait_for_step(10)
    # For the runs to come: it goes on with its own, as that was when it was submitted.
    Path("runs.txt").write_text(f"{other}\n{other}\n{' '.join(hand_made)}\n")
    Path("flowjobs.toml").write_text("lr = 0.5\n")
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.status().attempts[0].job.job_id == f"{job.job_id}_2"
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert job.steps_lost() == 0
    assert_equal_to(whole, job.run)


@pytest.mark.long
def test_a_task_of_a_sweep_continues_as_a_job_of_its_own_where_requeuing_is_forbidden(
    slurm: SlurmCluster,
    study: Path,
    flowjobs: Command,
    whole: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    Path("control").write_text("await 10")
    where = ("--partition", "preempt", "--sbatch", "no-requeue=True", "nodelist=n1")
    done = flowjobs("sweep", *OPTIONS, "--seed", "0", "--name", "one", *where)
    assert done.returncode == 0, done.stderr
    run = Run(study, "SlowModel-icfm-digits-none")
    job = Disturbed(run, run.submissions()[0].job_id, slurm)
    job.wait_for_step(10)
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.steps_lost() == 0
    assert_equal_to(whole, run)
    task, new = run.submissions()
    assert task.job_id.endswith("_0")
    assert new.continues == task.job_id
    record = slurm.job(new.job_id)
    assert (record["JobName"], record["Partition"]) == (run.name, "preempt")
    assert "finished   1\n" in flowjobs("sweep", "one").stdout


@pytest.mark.long
def test_two_nodes_of_two_ranks_leave_at_one_step_and_lose_nothing(
    start: Start, flowjobs: Command, study: Path
) -> None:
    ranks = ("--nodes", "2", "--gpus-per-node", "2", "--partition", "preempt")
    job = start(*ranks, "--sbatch", "nodelist=n[1-2]")
    preempt_and_wait(job)
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "preempted"), ("finished", "")]
    assert job.steps_lost() == 0

    done = flowjobs("submit", *OPTIONS, "--name", "whole", *ranks)
    assert done.returncode == 0, done.stderr
    whole = Disturbed(Run(study, "whole"), "", job.slurm)
    whole.wait_for_state("finished")
    assert_equal_to(whole.run, job.run)


@pytest.mark.long
def test_a_bug_on_another_rank_is_told_by_the_first_one_and_not_repeated(
    start: Start, flowjobs: Command
) -> None:
    job = start("--gpus-per-node", "2", "--retries", "3", *ON_N1)
    job.tell("1:raise")
    status = job.wait_for_state("failed")
    bug = r"rank 1 on n1: ValueError \(.*slow_model.py, line \d+, in \w+\): the model was told to"
    assert re.match(bug, status.reason)
    assert (job.attempts(), status.exit_code) == ([("failed", "exception")], 1)
    assert status.attempts[0].job.ranks == 2
    assert job.slurm.wait_state(job.job_id, {"FAILED", "PENDING"}) == "FAILED"
    logged = flowjobs("logs", "disturbed").stdout
    assert 'raise ValueError("the model was told to fail")' in logged
    assert_in_wandb(job.run, "failed", 1, "told to fail")
    again = flowjobs("submit", *OPTIONS, "--name", "disturbed", "--dry-run").stdout
    assert "disturbed has trained with 2 ranks, and would now with 1" in again
    job.is_row("raises an exception on another rank than the first")


@pytest.mark.parametrize(
    "told", ["0:hold\n1:kill", pytest.param("1:kill", marks=pytest.mark.long)], ids=repr
)
def test_another_rank_that_is_killed_ends_the_run_which_is_retried_elsewhere(
    start: Start, told: str
) -> None:
    """Whether the first one waits for it or sees it go; that it is told to end is no preemption."""
    job = start("--gpus-per-node", "2", "--retries", "1", "--epochs", "1")
    job.tell(told)
    job.wait_for_state("preempted")
    job.tell("")
    job.wait_for_state("finished")
    assert job.attempts() == [("preempted", "killed"), ("finished", "")]
    first, second = job.status().attempts
    assert f"rank 1 on {first.job.host}: killed (SIGKILL)" in first.reason
    assert first.job.host != second.job.host
    assert job.job_ids() == [job.job_id]
