"""What an answer of Slurm's means at the depth of `ask` and `sbatch`, where sites interfere.

On the real Slurm; what a site varies is a script on PATH around the real command.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.config import RunConfig
from flowjobs.errors import SubmissionUnknownError
from flowjobs.jobs.current_job import jobs_of
from flowjobs.jobs.environment import waited_while_cancelled
from flowjobs.jobs.origin import Origin, noted_identity
from flowjobs.jobs.restart import resubmit
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.slurm.controller import cancel, job_record, requeue
from flowjobs.slurm.jobs import JobAnswer, Known, Unknown, ask_one
from flowjobs.slurm.submission import cancelled_unless_noted, sbatch
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until

Site = Callable[[str, str], None]

AS_IT_IS = 'exec $real "$@"'
SKEWED = '$real "$@" | sed "s/$(date +%Y)-/2001-/g"'


@pytest.fixture
def waiting(slurm: SlurmCluster, study: Path) -> Run:
    """A run whose job waits until it is released."""
    run = Run(study, "a")
    run.create(RunConfig())
    log = f"--output={run.logs}/%j_0_log.out"
    job = sbatch(["sbatch", "--hold", "-J", "a", log, "--wrap=true"], os.environ)
    run.add_submission(job.job_id, "slurm", run.output_of(job.job_id), identity=job.identity("a"))
    return run


def word_on(run: Run, **noted: str) -> JobAnswer:
    (entry,) = run.submissions()
    return ask_one(replace(noted_identity(entry), **noted))


def test_a_living_job_is_never_gone_or_ended_whatever_a_site_makes_of_it(
    slurm: SlurmCluster, waiting: Run, site: Site, tmp_path: Path
) -> None:
    (entry,) = waiting.submissions()
    site("sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    # Another cluster of a federation has it.
    site("squeue", '$real "$@" | sed s/PENDING/REVOKED/')
    assert isinstance(answer := word_on(waiting), Unknown)
    assert "on another cluster of the federation" in answer.why
    # A pipe loses the exit code; the user database is away.
    for said in ("slurm_load_jobs error: Unable to contact slurm", f"Invalid user: {os.getuid()}"):
        site("squeue", f"echo 'squeue: error: {said}' >&2; exit 0")
        assert isinstance(answer := word_on(waiting), Unknown)
        assert said in answer.why
    site("squeue", AS_IT_IS)
    # Its name and its comment are rewritten: the folder of its logs is not, whatever leads there.
    slurm.run("scontrol", "update", f"jobid={entry.job_id}", "JobName=lab-a", "Comment=audited")
    assert isinstance(word_on(waiting), Known)
    (tmp_path / "link").symlink_to(waiting.study)
    linked = Run(tmp_path / "link", "a")
    assert isinstance(word_on(waiting, log=str(linked.output_of(entry.job_id))), Known)
    assert isinstance(answer := word_on(waiting, log="/elsewhere/logs/x.out"), Unknown)
    assert "in the queue, with another name, comment and log" in answer.why
    # A submitter that died before it could note the job may have spelled the study otherwise.
    waiting.jobs_file.unlink()
    linked.batch_file.touch()
    (found,) = jobs_of([linked])[linked]  # type: ignore[misc, union-attr]
    assert found.job_id == entry.job_id


def test_how_a_job_ended_is_known_where_a_query_may_be_about_a_short_time_only(
    slurm: SlurmCluster, waiting: Run, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = waiting.submissions()
    cancel(entry.job_id)
    site("squeue", "exit 0")  # the controller has forgotten it
    wait_until(lambda: isinstance(word_on(waiting), Known), "accounting to know it", 60)
    # The controller has lost it as it was requeued: it is over, once accounting has had time to
    # name its next start, or nobody could end it or submit the run again.
    site("sacct", '$real "$@" | sed "s/CANCELLED by [0-9]*/REQUEUED/"')
    assert isinstance(answer := word_on(waiting), Unknown)
    assert "accounting says REQUEUED" in answer.why
    with monkeypatch.context() as later:
        later.setattr("flowjobs.slurm.jobs.SETTLED_AFTER_S", -1.0)
        assert isinstance(answer := word_on(waiting), Known)
        assert (answer.over, answer.newest.state) == (True, "PREEMPTED")
    refused = "sacct: error: slurmdbd: Too wide of a date range in query"
    site("sacct", f'case " $* " in *" -S "*) exec $real "$@";; esac; echo "{refused}" >&2; exit 1')
    assert isinstance(answer := word_on(waiting), Known)
    assert answer.newest.state == "CANCELLED"
    # Of an older one, and where more is refused, nothing is known.
    identity = replace(noted_identity(entry), submitted=0.0)
    assert isinstance(old := ask_one(identity), Unknown)
    assert refused in old.why
    site("sacct", f"echo '{refused}' >&2; exit 1")
    assert isinstance(answer := word_on(waiting), Unknown)
    assert refused in answer.why


def test_a_job_that_may_have_been_taken_is_not_refused_and_where_it_went_it_is_cancelled(
    slurm: SlurmCluster, waiting: Run, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = ["sbatch", "--hold", "--output=/dev/null", "--wrap=true"]
    # The clock of the controller is far behind: the mark finds the job all the same.
    site("squeue", SKEWED)
    site("sbatch", 'echo "Welcome!"; $real "$@"')
    found = sbatch(held, os.environ).job_id
    assert found in slurm.run("squeue", "-h", "-o", "%i").split()
    site("sbatch", 'shift 2; echo "Welcome!"; $real "$@"')  # and the site drops comments
    with pytest.raises(SubmissionUnknownError, match="whether the job was taken is unknown"):
        sbatch(held, os.environ)
    site("squeue", AS_IT_IS)
    # Of another cluster an id means nothing here, or another job.
    site("sbatch", f"echo '{found};other'")
    taken = sbatch(held, os.environ)

    def cannot_note() -> None:
        with cancelled_unless_noted(lambda: taken):
            raise OSError("Disk quota exceeded")

    with pytest.raises(SubmissionUnknownError, match=f"scancel -M other {found}$"):
        cannot_note()
    assert found in slurm.run("squeue", "-h", "-o", "%i").split()
    # To the second, a job that was submitted right after its run was cancelled is wanted.
    (entry,) = waiting.submissions()
    monkeypatch.setenv("SLURM_JOB_ID", entry.job_id)
    monkeypatch.setenv("FLOWJOBS_JOB", entry.job_id)
    record = job_record(entry.job_id)
    assert record is not None
    waiting.request_cancel()
    for after_s, waited in ((0.5, False), (1.5, True)):
        os.utime(waiting.cancel_file, (record.submitted + after_s,) * 2)
        assert waited_while_cancelled(waiting) == waited


def test_a_node_is_left_out_only_where_another_one_can_start_the_job(
    slurm: SlurmCluster, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_CONSTRAINT", "nowhere")  # of who asks, and not of the job
    rest = ("--constraint=", "--requeue", "--mem=1G", "--output=/dev/null", "--wrap=sleep 600")
    # GPUs by --gres, processors, a list of nodes, and a node that is left out already.
    for asked, left_out in (
        (("--gres=gpu:1", "--exclude=n2"), "n2,n1"),
        (("--nodes=4", "--ntasks-per-node=2"), "(null)"),
        (("--nodelist=n1",), "(null)"),
        (("--exclude=n[2-4]",), "n[2-4]"),
    ):
        job_id = slurm.submit(*asked, *rest)
        slurm.wait_state(job_id, "RUNNING")
        requeue(job_id, exclude="n1")
        assert slurm.job(job_id)["ExcNodeList"] == left_out
        slurm.run("scancel", job_id)
    monkeypatch.delenv("SBATCH_CONSTRAINT")
    # As a new job, too.
    run = Run(study, "a")
    run.create(RunConfig())
    Path("job.sh").write_text("#!/bin/sh\n")
    Origin.here().note(run, "7")
    for asked, left_out in (((), "n1"), (("--nodelist=n1",), "(null)")):
        run.add_submission("7", "slurm", None, again=["sbatch", "--hold", *asked, "job.sh"])
        new = resubmit(run, JobInfo("slurm", "7", None, "n1", 1), lambda: None, "n1")
        assert slurm.job(new)["ExcNodeList"] == left_out
