"""A job that waits says why: in `status` and while it is followed, on the real Slurm."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flowjobs.runs.run import Run
from flowjobs.slurm import client
from flowjobs.slurm.client import first_line, run_command
from flowjobs.slurm.controller import JobRow, cancel
from flowjobs.slurm.submission import UNANSWERED
from flowjobs.slurm.waiting import why_it_waits
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command

ROW = JobRow("12", "PENDING", 0, "test", "a", 0.0)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("JobHeldAdmin", "held by an administrator"),
        ("Resources", "nodes or GPUs"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "down, drained or reserved (ReqNodeNotAvail,"),
        ("QOSMaxGRESPerUser", "a limit of its QOS (QOSMaxGRESPerUser)"),
        ("QOSMaxWallDurationPerJobLimit", "and cannot start: its time limit"),
        ("AssocMaxWallDurationPerJobLimit", "and cannot start: its time limit"),
        ("AssocMaxGRESPerJob", "and cannot start: it asks for more than its account allows"),
        ("AssocMaxNodePerJobLimit", "and cannot start: it asks for more than its account allows"),
        ("QOSMaxCpuPerJobLimit", "and cannot start: it asks for more than its QOS allows"),
        ("QOSMinGRES", "and cannot start: it asks for less than its QOS demands"),
        ("DeadLine", "and cannot start: it would not end before its deadline"),
        (
            "AssociationTimeLimit",
            "a limit of your account",
        ),  # used up, for now
        ("AssocMaxJobsLimit", "a limit of your account (AssocMaxJobsLimit)"),
        ("AssocGrpCPURunMinutesLimit", "a limit of your account"),
        ("QOSMaxSubmitJobPerUserLimit", "a limit of its QOS"),
        ("AssocGrpGRESMinutes", "a limit of your account"),
        ("PartitionDown", "which is down"),
        ("ReservationDeleted", "held, for its reservation was deleted: submit it without"),
        ("Reservation", "for its reservation to begin"),
        ("MaxMemPerLimit", "and cannot start: it asks for more memory"),
        ("MaxBillingPerAccount", "a limit of your account"),
        ("launch failed requeued held", "could not start it: `scontrol release 12`"),
        ("None", "for Slurm to schedule it"),
        ("SomethingNew", "Slurm's reason SomethingNew"),
    ],
)
def test_slurms_words_are_said_in_plain_ones(reason: str, words: str) -> None:
    waiting = why_it_waits(JobRow(**{**vars(ROW), "reason": reason}))
    assert words in waiting.why
    assert waiting.stuck == words.startswith(("held", "and cannot", "could not"))


def test_a_job_whose_nodes_boot_waits_for_them() -> None:
    row = JobRow(**{**vars(ROW), "state": "CONFIGURING", "reason": "None"})
    assert row.waits
    assert why_it_waits(row).why == "for its nodes to be made ready (CONFIGURING)"


def test_a_command_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "SAY_AFTER_S", 0.0)
    answer = run_command("sleep", "600", timeout_s=3)
    said = "sleep did not answer within 3 s"
    assert caplog.messages == ["sleep has not answered yet; waiting up to 3 s"]
    assert (answer.returncode, first_line(answer), bool(UNANSWERED.search(said))) == (1, said, True)


def test_neither_a_users_filters_nor_a_question_keep_a_job_from_being_cancelled(
    slurm: SlurmCluster, site: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = slurm.submit("--hold", "--output=/dev/null", "--wrap", "true")
    with monkeypatch.context() as settings:
        settings.setenv("SCANCEL_STATE", "RUNNING")
        settings.setenv("SCANCEL_INTERACTIVE", "1")
        cancel(job)
    slurm.wait_state(job, {"CANCELLED"})
    # Nor is the answer to one of the site's taken from what this process is given to read.
    site("sbatch", 'read -p "May you use this partition? " said || exit 1; echo "took $said" >&2')
    mine, theirs = os.pipe()
    os.write(theirs, b"run2\n")
    kept = os.dup(0)
    os.dup2(mine, 0)
    try:
        answer = run_command("sbatch")
    finally:
        os.dup2(kept, 0)
        for opened in (mine, theirs, kept):
            os.close(opened)
    assert (answer.returncode, answer.stderr) == (1, "")


def test_status_and_follow_say_why_a_job_waits(
    slurm: SlurmCluster, flowjobs: Command, study: Path
) -> None:
    blocker = slurm.submit("--hold", "--output=/dev/null", "--wrap", "true")
    options = {
        "held": "hold=True",
        "later": "begin=now+1hour",
        "after": f"dependency=afterok:{blocker}",
    }
    for name, option in options.items():
        done = flowjobs("submit", "--name", name, "--sbatch", option)
        assert done.returncode == 0, done.stderr

    def reasons() -> set[str]:
        return set(slurm.run("squeue", "-h", "-o", "%r").split())

    wait_until(lambda: {"BeginTime", "Dependency"} <= reasons(), "the scheduler's look", 120)
    held = Run(study, "held").submissions()[0].job_id
    said = flowjobs("status").stdout
    assert f"held waits held by its user: `scontrol release {held}` lets it start" in said
    assert "later waits for its start time, about 20" in said
    assert f"after waits for other jobs to end (afterok:{blocker}" in said
    one = json.loads(flowjobs("status", "held", "--json").stdout)
    assert one["waits"].endswith("(JobHeldUser)")

    followed = [sys.executable, "-u", "-m", "flowjobs", "submit", "--name", "followed", "--follow"]
    with (
        Path("said").open("w") as out,
        subprocess.Popen([*followed, "--sbatch", "hold=True"], stdout=out, stderr=out) as process,
    ):
        said_why = "waits held by its user"
        wait_until(lambda: said_why in Path("said").read_text(), "its words", 120)
        os.kill(process.pid, signal.SIGINT)
        process.wait(120)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("command", "state", "said"),
    [
        ("suspend", "SUSPENDED", "waits suspended, for another job or by an administrator"),
        ("requeuehold State=SpecialExit", "SPECIAL_EXIT", "waits held as it was requeued"),
    ],
)
def test_a_job_that_stands_still_is_not_said_to_run(
    slurm: SlurmCluster, flowjobs: Command, study: Path, command: str, state: str, said: str
) -> None:
    assert flowjobs("submit", "--name", "a").returncode == 0
    job = Run(study, "a").submissions()[0].job_id
    slurm.wait_state(job, {"RUNNING"})
    verb, *options = command.split()
    slurm.run("scontrol", verb, *options, job)
    slurm.wait_state(job, {state})
    assert said in flowjobs("status").stdout
