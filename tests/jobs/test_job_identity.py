"""Which job is ours, and what an answer of Slurm's means, where sites and other jobs interfere.

On the real Slurm; what a site varies is a script on PATH around the real command.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.rm import Rm
from flowjobs.errors import SubmissionUnknownError
from flowjobs.jobs.current_job import running_job, running_jobs
from flowjobs.jobs.run_stages import stages
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus
from flowjobs.slurm import submission
from flowjobs.slurm.cluster import cluster_name, kill_wait_s, partitions
from flowjobs.slurm.controller import job_record
from flowjobs.sweeps.retry import causes
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command

Site = Callable[[str, str], None]
Submit = Callable[..., Run]

HELD = ("--arch", "mlp", "--flow", "icfm", "--sbatch", "hold=True", "--wandb-mode", "disabled")


@pytest.fixture
def submitted(slurm: SlurmCluster, flowjobs: Command, study: Path) -> Submit:
    """Submits a run whose job waits until it is released."""

    def submit(name: str = "a", *options: str) -> Run:
        done = flowjobs("submit", *HELD, "--name", name, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(study, name)

    return submit


def queue(slurm: SlurmCluster) -> list[str]:
    return slurm.run("squeue", "-h", "-o", "%i").split()


def job_of(run: Run) -> str:
    (entry,) = run.submissions()
    return str(entry.job_id)


def note_instead(run: Run, **values: object) -> None:
    """Changes what the run has noted of its job."""
    (entry,) = run.submissions()
    run.jobs_file.write_text(json.dumps(asdict(entry) | values) + "\n")


@pytest.mark.parametrize(
    "wrapper",
    [
        'echo "last job 7 is running"; $real "$@"; echo "job 8 may start soon"',
        'id=$($real "$@"); echo "Submitted batch job $id"; echo "12 jobs of you wait"',
        'echo 3; $real "$@" >/dev/null; echo 4',  # a bare number that is no job's
        'printf "Gr\\xfc\\xdfe\\n"; $real "$@"; exit 1',  # not UTF-8; it fails afterwards
        # The site drops comments, and the option that asks for the id alone.
        'shift 2; echo "job 1 of 2"; $real "$@"',
        # The controller is busy: no answer comes, and it takes the job a moment later.
        '(sleep 2; $real "$@") >/dev/null 2>&1 & echo "error: Socket timed out" >&2; exit 1',
    ],
)
def test_the_id_that_is_noted_is_that_of_the_job(
    slurm: SlurmCluster,
    submitted: Submit,
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    wrapper: str,
) -> None:
    # On a busy machine the moment is longer.
    patch = "from flowjobs.slurm import submission\nsubmission.TAKEN_WITHIN_S = 600.0\n"
    Path("sitecustomize.py").write_text(patch)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    site("sbatch", wrapper)
    run = submitted()
    assert [job_of(run)] == queue(slurm)
    assert run.submissions()[0].slurm_cluster == "flowjobs"


@pytest.mark.parametrize(
    "comment",
    [("--comment", "project  x"), ("--sbatch", "comment=project  x", "hold=True")],
    ids=["--comment", "--sbatch"],
)
def test_our_mark_stands_beside_the_users_own_comment(
    slurm: SlurmCluster, submitted: Submit, comment: tuple[str, ...]
) -> None:
    run = submitted("a", *comment)
    (entry,) = run.submissions()
    assert slurm.job(entry.job_id)["Comment"] == f"project x flowjobs:{entry.mark}"


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        ("echo 'sbatch: error: no more GPUs' >&2; exit 1", "no more GPUs"),
        ("echo 'your job 7 was taken'", "sbatch printed no job id, and no new job is in the queue"),
    ],
)
def test_a_refused_submission_leaves_nothing_behind(
    slurm: SlurmCluster, flowjobs: Command, study: Path, site: Site, wrapper: str, said: str
) -> None:
    site("sbatch", wrapper)
    done = flowjobs("submit", *HELD, "--name", "new")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not Run(study, "new").folder.exists()
    assert not Run(study, "new").checkpoints.exists()


def test_a_job_that_sbatch_got_no_answer_for_is_not_said_to_be_refused(
    slurm: SlurmCluster,
    flowjobs: Command,
    study: Path,
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    site("sbatch", "echo 'sbatch: error: Socket timed out on send/recv' >&2; exit 1")
    monkeypatch.setattr(submission, "TAKEN_WITHIN_S", 0.1)
    with pytest.raises(SubmissionUnknownError, match="whether the job was taken is unknown"):
        submission.sbatch(["sbatch", "x.sh"], os.environ)
    assert "sbatch got no answer; looking for the job, up to 0 s" in caplog.messages
    site("squeue", "exit 1")
    # In its own process, too, it waits for no job that comes late.
    patch = "from flowjobs.slurm import submission\nsubmission.TAKEN_WITHIN_S = 0.0\n"
    Path("sitecustomize.py").write_text(patch)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    assert flowjobs("submit", *HELD, "--name", "a").returncode == 75
    assert Run(study, "a").exists()  # of a job that may come yet, and would train it
    site("squeue", 'exec $real "$@"')
    site("sbatch", 'exec $real "$@"')
    assert flowjobs("submit", *HELD, "--name", "a").returncode == 0
    assert not Run(study, "a").batch_file.exists()


def test_a_refused_submission_leaves_a_run_as_it_was(
    submitted: Submit, flowjobs: Command, site: Site
) -> None:
    run = submitted()
    assert flowjobs("cancel", "a").returncode == 0
    before = run.config_file.read_bytes(), run.cancel_file.read_bytes()
    site("sbatch", "exit 1")
    assert flowjobs("submit", *HELD, "--name", "a", "--epochs", "60").returncode == 2
    assert (run.config_file.read_bytes(), run.cancel_file.read_bytes()) == before


@pytest.mark.parametrize("what", ["jobs.jsonl", "logs/$(squeue -h -o %i)_origin.json/x"])
def test_a_job_that_cannot_be_noted_is_cancelled(
    slurm: SlurmCluster, flowjobs: Command, study: Path, site: Site, what: str
) -> None:
    # As a full quota would: what is to be written after the submission cannot be.
    site("sbatch", f'$real "$@"; mkdir -p {study}/runs/a/{what}')
    done = flowjobs("submit", *HELD, "--name", "a")
    assert done.returncode == 2
    assert "was submitted, but could not be noted" in done.stderr
    assert "it is cancelled" in done.stderr
    wait_until(lambda: not queue(slurm), "the job to be gone", 120)


def test_a_job_whose_submitter_dies_as_it_is_taken_is_found_trains_and_is_cancelled(
    slurm: SlurmCluster,
    flowjobs: Command,
    study: Path,
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [Run(study, name) for name in "ab"]
    site("sbatch", '$real "$@"; kill -9 $PPID')
    for run in runs:
        assert flowjobs("submit", *HELD, "--name", run.name).returncode == -9
    first, second = sorted(queue(slurm), key=int)
    assert f"already has job {first} (pending)" in flowjobs("submit", *HELD, "--name", "a").stdout
    asked = runs[0].config_file.read_bytes()
    done = flowjobs("train", "--epochs", "1", "--name", "a", "--wandb-mode", "disabled")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"a already has job {first} (pending), waits held" in done.stderr
    assert "give this one a --name of its own" in done.stderr
    with monkeypatch.context() as by_hand:  # a job by sbatch/train.sh that starts meanwhile
        by_hand.setenv("SLURM_JOB_ID", "999999")
        by_hand.setenv("FLOWJOBS_JOB", "999999")
        done = flowjobs("train", "--lr", "1", "--name", "a", "--wandb-mode", "disabled")
    assert "a run named a exists with another config" in done.stderr
    assert runs[0].config_file.read_bytes() == asked
    # Slurm is asked as often about two of them as about one.
    site("squeue", f'echo x >> {tmp_path}/calls; exec $real "$@"')
    assert str(running_job(runs[0])).startswith(f"job {first} (pending), waits held by its user")
    calls = (tmp_path / "calls").read_text()
    jobs = [str(busy).partition(" (pending)")[0] for busy in running_jobs(runs).values()]
    assert jobs == [f"job {first}", f"job {second}"]
    assert (tmp_path / "calls").read_text() == 2 * calls
    slurm.run("scontrol", "release", first)
    wait_until(lambda: runs[0].status().attempts, "the first to train", 120)
    done = flowjobs("cancel", "a", "b").stdout
    assert f"cancelled job {first};" in done
    assert f"cancelled job {second};" in done
    wait_until(lambda: not queue(slurm), "the jobs to be gone", 120)


def test_a_strangers_job_is_not_cancelled(
    slurm: SlurmCluster, submitted: Submit, flowjobs: Command
) -> None:
    run = submitted("a")
    slurm.run("scancel", job_of(run))
    # One with the run's own name, and one of another run of the study.
    namesake = slurm.submit("--hold", "-J", "a", "-o", "/dev/null", "--wrap=true")
    for stranger in (namesake, job_of(submitted("b"))):
        note_instead(run, job_id=stranger)
        done = flowjobs("cancel", "a")
        assert stranger in queue(slurm)
        assert "cancelled job" not in done.stdout


def test_the_job_of_an_original_is_not_that_of_its_copy(
    slurm: SlurmCluster, submitted: Submit, flowjobs: Command, study: Path
) -> None:
    job = job_of(submitted())
    copy = Run(study.with_name("copy"), "a")
    shutil.copytree(study, copy.study)
    there = ("--study", str(copy.study))
    assert "no job of it waits or runs" in flowjobs("cancel", "a", *there).stdout
    assert queue(slurm) == [job]
    assert flowjobs("submit", *HELD, "--name", "a", *there).returncode == 0
    own = job_of(copy)
    assert sorted(queue(slurm)) == sorted([job, own])
    assert f"cancelled job {own}" in flowjobs("cancel", "a", *there).stdout
    # One that was moved keeps its own.
    moved = Run(study.rename(study.with_name("moved")), "a")
    assert f"cancelled job {job}" in flowjobs("cancel", "a", "--study", str(moved.study)).stdout


def test_what_accounting_has_of_an_older_job_of_the_id_is_not_believed(
    slurm: SlurmCluster, submitted: Submit, flowjobs: Command, site: Site
) -> None:
    run = submitted()
    job = job_of(run)
    # The controller has forgotten ours; accounting has another's, with its name, from last year.
    slurm.run("scancel", job)
    old = f"{job}|FAILED|0|flowjobs|2025-01-01T00:00:00|2025-01-01T01:00:00|1:0|n1|a||sbatch x"
    old = old.replace("|", "\\x1f")
    site("squeue", "exit 0")
    site("sacct", f"printf '{old}\\n'")
    before = contents(run.study)
    done = flowjobs("reconcile")
    assert (done.returncode, done.stdout) == (2, "")
    assert "accounting has no word of it" in done.stderr
    assert contents(run.study) == before
    site("sacct", f"printf '{old}\\n'; $real \"$@\"")
    wait_until(lambda: "a: cancelled" in flowjobs("reconcile").stdout, "accounting to know", 120)


def test_banners_and_bytes_that_are_no_text_change_no_answer(
    slurm: SlurmCluster, submitted: Submit, flowjobs: Command, site: Site
) -> None:
    slurm.run("sbatch", "--hold", "-J", os.fsdecode(b"caf\xe9 \x1b[1m"), "--wrap=true")
    run = submitted()
    job = job_of(run)
    expected = job_record(job), partitions()
    for command in ("squeue", "sacct", "scontrol", "scancel", "sinfo", "sacctmgr"):
        banner = 'printf "Universit\\xe4t\\n\\n** error-free since=2019 | JobState **\\n"'
        site(command, f'{banner}; {banner} >&2; $real "$@"; code=$?; {banner}; exit $code')
    found = job_record(job)
    assert found is not None
    assert expected[0] is not None
    assert found.fields["Comment"] == expected[0].fields["Comment"]
    assert (found.state, found.seconds_left) == ("PENDING", expected[0].seconds_left)
    assert partitions() == expected[1]
    assert kill_wait_s() == 20
    assert cluster_name() == "flowjobs"
    done = flowjobs("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert "already has job" in flowjobs("submit", *HELD, "--name", "a").stdout
    assert f"cancelled job {job}" in flowjobs("cancel", "a").stdout
    assert "accounting" not in flowjobs("reconcile").stderr


def test_status_asks_twice_at_most_and_only_reads(
    slurm: SlurmCluster, submitted: Submit, study: Path, site: Site
) -> None:
    runs = [submitted(name) for name in ("waits", "cancelled", "unheard-of")]
    slurm.run("scancel", job_of(runs[1]))
    note_instead(runs[2], job_id="999999")
    for command in ("squeue", "sacct", "scontrol", "sbatch", "scancel"):
        site(command, f'echo {command} >> calls; $real "$@"')
    before = contents(study)
    read_only = f"mount --bind {study} {study} && mount -o remount,ro,bind {study} && exec "
    status = f"{sys.executable} -m flowjobs status --json"
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", read_only + status],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contents(study) == before
    assert sorted(Path("calls").read_text().split()) == ["sacct", "squeue"]
    found = {run["run"]: run for run in json.loads(done.stdout)}
    assert found["waits"]["state"] == "submitted"
    assert found["cancelled"]["state"] == "cancelled"
    assert "job 999999" in found["unheard-of"]["unknown"]


def contents(study: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(study.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def silence(site: Site, *commands: str, text: str = "exit 0") -> None:
    for command in commands:
        site(command, text)


@pytest.mark.parametrize(
    ("noted", "silent", "said"),
    [
        ({"slurm_cluster": "other"}, (), "is of the cluster other, and flowjobs answers here"),
        ({"uid": 54_321}, (), "of user 54321: ask as that user"),
        ({}, ("squeue", "sacct"), "accounting has no word of it"),  # jobs are private
        ({}, ("squeue", "sacct", "scontrol"), "accounting has no word of it"),
    ],
)
def test_what_is_unknown_is_said_and_nothing_is_done(
    slurm: SlurmCluster,
    submitted: Submit,
    flowjobs: Command,
    site: Site,
    noted: dict[str, object],
    silent: tuple[str, ...],
    said: str,
) -> None:
    run = submitted()
    (entry,) = run.submissions()
    note_instead(run, **noted)
    if noted:
        submitted("here")  # so that it can be seen which cluster answers
    for command in silent:
        site(command, "exit 0")
    jobs, before = queue_of(slurm), contents(run.folder)
    # Without scontrol nobody knows which cluster answers: nothing would be submitted to it anyway.
    here = ("--cluster", "local") if "scontrol" in silent else ()
    for command in (("status",), ("reconcile",), ("submit", *HELD, "--name", "a", *here)):
        done = flowjobs(*command)
        assert said in done.stderr, command
        assert "Traceback" not in done.stderr
        assert done.returncode == (0 if command == ("status",) else 2)
    assert contents(run.folder) == before
    done = flowjobs("cancel", "a")
    assert done.returncode == 2
    assert said in done.stderr
    assert run.cancel_requested()
    assert queue_of(slurm) == jobs
    assert entry.job_id in jobs


def test_a_run_that_was_cancelled_while_slurm_was_away_keeps_its_one_job(
    slurm: SlurmCluster, submitted: Submit, flowjobs: Command, study: Path, site: Site
) -> None:
    run = submitted()
    site("squeue", "exit 1")
    assert "it is noted as cancelled" in flowjobs("cancel", "a").stderr
    member = stages({run: run.config()})[run]
    assert (member.stage, causes([member])) == ("cancelled", [])
    assert Rm(names=("a",), yes=True, study=study).run(Defaults()) == 2
    assert run.exists()
    site("squeue", 'exec $real "$@"')
    done = flowjobs("submit", *HELD, "--name", "a")
    assert done.returncode == 2
    assert f"a is cancelled but still has job {job_of(run)} (pending)" in done.stderr
    assert run.cancel_requested()
    assert queue(slurm) == [job_of(run)]


@pytest.mark.parametrize("installed", [True, False])
def test_where_there_is_no_accounting_the_cluster_itself_says_what_is_gone(
    slurm: SlurmCluster,
    submitted: Submit,
    flowjobs: Command,
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
) -> None:
    run = submitted()
    slurm.run("scancel", job_of(run))
    if installed:
        site("sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    else:
        (tmp_path / "bin").mkdir()
        for command in ("bash", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "git"):
            (tmp_path / "bin" / command).symlink_to(shutil.which(command) or "")
        monkeypatch.setenv("PATH", f"{tmp_path / 'site'}:{tmp_path / 'bin'}")
    site("squeue", "exit 0")  # the controller has forgotten it
    done = flowjobs("reconcile")
    # Cancelled or failed, nobody knows: it is not started again without a person.
    assert "is gone, and Slurm keeps no record of why: submit it again" in done.stderr
    assert run.status() == RunStatus()
    assert flowjobs("submit", *HELD, "--name", "a").returncode == 0
    assert len(run.submissions()) == 2


def test_what_is_on_record_of_an_end_needs_no_word_of_slurm(
    slurm: SlurmCluster, submitted: Submit, flowjobs: Command, site: Site
) -> None:
    run = submitted()
    slurm.run("scancel", job_of(run))
    assert "a: cancelled" in flowjobs("reconcile").stdout
    site("squeue", "exit 0")
    site("sacct", "echo 'sacct: error: the database is down' >&2; exit 1")
    assert flowjobs("submit", *HELD, "--name", "a").returncode == 0
    # Of the job that waits now nothing is on record.
    assert "what became of job" in flowjobs("submit", *HELD, "--name", "a").stderr


def queue_of(slurm: SlurmCluster) -> list[str]:
    path = os.environ["PATH"]
    try:
        os.environ["PATH"] = ":".join(part for part in path.split(":") if "/site" not in part)
        return queue(slurm)
    finally:
        os.environ["PATH"] = path
