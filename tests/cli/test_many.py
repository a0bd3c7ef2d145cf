"""Commands on many runs: cancel, retry, wait and rm."""

import dataclasses
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flowjobs.cli.main import parse
from flowjobs.config import RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import CheckpointGoneError, ConfigError
from flowjobs.field_values import KeyValues
from flowjobs.runs.pack import new_pack
from flowjobs.runs.process import process_mark
from flowjobs.runs.removal import remove, size_of
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, RunStatus, now
from flowjobs.sweeps.retry import changes_from, with_changes
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command

SWEEP = ("sweep", "--seed", "0", "1", "2", "--wandb-mode", "disabled", "--epochs", "1")


def ended(study: Path, name: str, outcome: Outcome, slurm: SlurmConfig | None = None) -> Run:
    """A run whose only attempt has ended, as it is on disk."""
    run = Run(study, name)
    tracking = TrackingConfig(wandb_mode="disabled")
    training = TrainingConfig(epochs=1)
    run.create(RunConfig(training, slurm or SlurmConfig(gpus_per_node=0), tracking))
    job = JobInfo("slurm", "7", None, "n1", 1)
    status = RunStatus(epochs=1, epoch=int(outcome.state == "finished"))
    status.attempts.append(AttemptRecord(1, job, started=now()))
    status.record_outcome(outcome)
    status.write(run.status_file)
    return run


def failed(study: Path, name: str, kind: str, reason: str = "", **options: object) -> Run:
    slurm = dataclasses.replace(SlurmConfig(gpus_per_node=0), **options)
    return ended(study, name, Outcome("failed", 1, reason or kind, kind=kind), slurm)


def without_checkpoints(study: Path, name: str) -> Run:
    """A run whose steps are on record, and of which nothing is left to resume from."""
    run = ended(study, name, Outcome("preempted", 75, "left", kind="preempted"))
    run.metrics_file.write_text('{"step": 5}\n')
    return run


def test_a_command_whose_output_is_closed_does_its_work(study: Path) -> None:
    ended(study, "a", Outcome("finished", 0))
    closed = 'exec "$0" -m flowjobs "$@" >&- 2>&-'
    for command in ("status", "show", "cancel"):
        done = subprocess.run(["sh", "-c", closed, sys.executable, command, "a"], check=False)
        assert done.returncode == 0


def test_without_a_reader_or_room_a_command_that_acts_does_its_work_and_one_that_looks_ends(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    failed(study, "gone", "killed")
    stopped = Outcome("preempted", 75, "interrupted by Ctrl-C", kind="preempted")
    runs = [ended(study, name, stopped) for name in ("a", "b")]
    runs[0].add_submission("7", "local", runs[0].logs / "7.log")
    (runs[0].logs / "7.log").write_text("trained\n")

    def code_of(*words: str, output: int, errors: int = subprocess.PIPE) -> tuple[int, str]:
        command = [sys.executable, "-m", "flowjobs", *words]
        done = subprocess.run(command, stdout=output, stderr=errors, text=True, check=False)
        return done.returncode, done.stderr

    ours, unread = os.pipe()
    os.close(ours)
    for words in (["status", "a"], ["logs", "-f", "a"], ["report", "--csv"], ["rm", "--help"]):
        assert code_of(*words, output=unread) == (0, ""), words
    assert code_of("cancel", "a", "b", output=unread) == (0, "")
    assert all(run.cancel_requested() for run in runs)
    assert code_of("wait", "gone", output=unread, errors=subprocess.STDOUT)[0] == 1
    os.close(unread)
    full = os.open("/dev/full", os.O_WRONLY)
    assert code_of("wait", "gone", output=full) == (1, "")
    for words in (["status"], ["rm", "gone", "--yes"]):
        code, said = code_of(*words, output=full)
        assert (code, said.startswith("error: standard output: No space left")) == (2, True), said
    os.close(full)
    assert not Run(study, "gone").exists()


def test_retry_says_what_failed_of_what_and_what_would_help(study: Path, flowjobs: Command) -> None:
    failed(study, "a-killed", "killed")
    failed(study, "b-memory", "out of memory", mem_gb=24.0)
    failed(study, "c-memory", "out of memory", "out of memory: 1.02 of 1 GiB on n1")
    failed(study, "d-time", "no progress", "…, the last one: time limit (USR2)", timeout_min=30)
    failed(study, "e-cuda", "exception", "OutOfMemoryError (net.py, line 3): CUDA out of memory")
    failed(study, "e-cublas", "exception", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    failed(study, "e-numpy", "exception", "_ArrayMemoryError (a.py, line 3): Unable to allocate")
    failed(study, "h-nan", "diverged", "train/loss is nan at step 10")
    without_checkpoints(study, "i-gone")
    ended(study, "f-whole", Outcome("finished", 0))
    ended(study, "g-ended", Outcome("cancelled", 130, "cancelled", kind="cancelled"))
    done = flowjobs("retry", "*", "--cluster", "local", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [line.split(";")[0].strip() for line in done.stdout.splitlines()[1:9]] == [
        *("unchanged  1 finished", "held       2 (GPU out of memory): e-cublas, e-cuda"),
        *("restarts   1 (cancelled): g-ended", "held       1 (checkpoints gone): i-gone"),
        *("held       1 (diverged): h-nan", "restarts   1 (killed): a-killed"),
        "held       3 (out of memory): b-memory, c-memory, e-numpy",
        "held       1 (time limit): d-time",
    ]
    assert done.stdout.count("not started, it would fail again") == 5
    assert "--with mem_gb=32\n" in done.stdout
    assert "--with timeout_min=60\n" in done.stdout
    assert "--with gpu_type=" in done.stdout
    assert "asks for   2 runs" in done.stdout


def test_retry_names_the_nodes_whose_gpu_was_lost(study: Path, flowjobs: Command) -> None:
    for name in "abc":
        run = failed(study, name, "lost GPU", exclude="n3" if name == "a" else None)
        status = run.status()
        last = status.attempts[-1]
        last.job = dataclasses.replace(last.job, host=f"n{name}")
        if name == "b":  # it was started elsewhere by itself
            first = dataclasses.replace(last, job=dataclasses.replace(last.job, host="n0"))
            last.job = dataclasses.replace(last.job, restart=1)
            status.attempts = [first, last]
        status.write(run.status_file)
    done = flowjobs("retry", "a", "b", "--cluster", "local", "--dry-run")
    said = "a, b; on n0, na, nb: --with exclude=n3,n0,na,nb starts them elsewhere\n"
    assert f"restarts   2 (lost GPU): {said}" in done.stdout, done.stdout


def test_what_shared_the_memory_of_a_job_is_retried_with_fewer_beside_it(
    study: Path, flowjobs: Command
) -> None:
    runs = [failed(study, name, "out of memory", mem_gb=24.0) for name in "ab"]
    pack = new_pack(study, "shared", runs, 4, runs[0].asked())
    pack.add_submission("7", "slurm", None)
    retry = ("retry", "a", "b", "--cluster", "local", "--dry-run")
    assert "would fail again: --with runs_per_gpu=2\n" in flowjobs(*retry).stdout
    asked = flowjobs(*retry, "--with", "runs_per_gpu=2").stdout
    assert (
        "asks for   1 job, as long as the partition allows; 2 runs share them, 2 at once" in asked
    )
    shutil.rmtree(study / "packs")  # tidied away: nobody knows how many shared
    assert "would fail again: --with mem_gb=32\n" in flowjobs(*retry).stdout


def test_a_retry_is_of_one_study(workplace: Path, flowjobs: Command) -> None:
    for study in ("a", "b"):  # a name says nothing of which one is meant
        failed(workplace / study, "x", "killed")
    done = flowjobs("retry", "a/runs/x", "b/runs/x", "--cluster", "local", "--dry-run")
    said = f"runs of {workplace}/a and {workplace}/b, expected those of one study"
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nodes=2", "the number of ranks decides the bits"),
        ("gpus-per-node=2", "the number of ranks decides the bits"),
        ("lr=1", "found lr, expected options of the cluster"),
        ("mem=1", "found mem, expected options of the cluster .*mem_gb"),
        ("timeout_min=long", "--with timeout_min: found 'long', expected int"),
        ("mem_gb=0", "--mem-gb: found 0.0, expected at least"),
        (f"mem_gb={'9' * 400}", "--with mem_gb: found 9+, expected float"),
    ],
)
def test_retry_takes_only_what_leaves_the_result_alone(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        with_changes(RunConfig(), changes_from([change]))


def test_a_text_among_the_options_of_a_retry_is_as_it_is_typed() -> None:
    changes = changes_from(["account=1234", "comment=1e5", "qos=007", "mem_gb=64"])
    assert changes == {"account": "1234", "comment": "1e5", "qos": "007", "mem_gb": 64.0}


def test_what_a_retry_changes_is_not_overruled_by_an_option_of_sbatch() -> None:
    options = KeyValues({"mem": "32G", "mem-per-cpu": "2G", "time": "4:00:00", "exclusive": True})
    before = RunConfig(slurm=SlurmConfig(sbatch=options))
    after = with_changes(before, changes_from(["mem_gb=64"])).slurm
    assert (after.mem_gb, after.sbatch) == (64, {"time": "4:00:00", "exclusive": True})
    assert with_changes(before, changes_from(["retries=1"])).slurm.sbatch == options


def test_the_command_that_retries_the_others_says_how() -> None:
    given = "--with account=1234 mem_gb=64 --parallel 2 --new-code --cluster local"
    command, defaults = parse(["retry", "a", *given.split()])
    assert command.flags_again(defaults) == given.split()


def test_retried_runs_are_an_array_with_more_memory_that_can_be_cancelled_and_waited_for(
    slurm: SlurmCluster, study: Path, flowjobs: Command
) -> None:
    for name in ("a", "b", "c"):
        failed(study, name, "out of memory", mem_gb=1.0, sbatch={"hold": True})
    failed(study, "d", "killed").config_file.write_text("{")
    retry = ("retry", "?")

    def retried() -> None:
        done = flowjobs(*retry, "--with", "mem_gb=2", "--parallel", "2")
        # All of them but one that cannot be read.
        assert (done.returncode, "error: d: " in done.stderr) == (2, True), done.stderr
        assert "restarts   3 (out of memory)" in done.stdout

    # Submitted from another terminal while the question stands.
    assert answer("y", retried) == 2
    runs = [Run(study, name) for name in ("a", "b", "c")]
    (array,) = {run.submissions()[0].job_id.partition("_")[0] for run in runs}
    assert slurm.job(f"{array}_0")["MinMemoryNode"] == "2G"
    assert runs[0].config().slurm.mem_gb == pytest.approx(2.0)

    again = flowjobs(*retry)
    assert "unchanged  3 waiting" in again.stdout
    living = flowjobs("rm", "a", "b", "--yes")
    assert living.returncode == 2
    assert re.search(
        r"a, b wait or run: cancel them first \(.*flowjobs cancel a b\)", living.stderr
    )

    assert flowjobs("cancel", "a").returncode == 0
    assert runs[0].status().state == "cancelled"
    states = slurm.run("squeue", "-h", "-r", "-t", "PD", "-o", "%i").split()
    assert sorted(states) == [f"{array}_1", f"{array}_2"]
    # Cancelled behind our back: neither the controller nor accounting knows of such a task.
    slurm.run("scancel", f"{array}_1")
    said = "job {array}_1 was cancelled before it started"
    wait_until(
        lambda: said.format(array=array) in flowjobs("status", "b", "--json").stdout, said, 60
    )
    slurm.run("scontrol", "release", array)
    waited = flowjobs("wait", "c")
    assert waited.returncode == 0, waited.stdout + waited.stderr
    assert waited.stdout.splitlines()[-1].endswith(" 1 finished")
    assert flowjobs("wait", "a", "b", "c").returncode == 130
    assert "2 (cancelled): a, b" in flowjobs(*retry, "--dry-run").stdout


def test_wait_ends_with_what_came_of_the_runs(study: Path, flowjobs: Command) -> None:
    ended(study, "whole", Outcome("finished", 0))
    failed(study, "killed", "killed")
    ended(study, "left", Outcome("preempted", 75, "interrupted by Ctrl-C", kind="preempted"))
    words = ("whole", "whole left", "*")
    done = {each: flowjobs("wait", *each.split()) for each in words}
    assert {each: run.returncode for each, run in done.items()} == dict(
        zip(words, (0, 75, 1), strict=True)
    )
    assert "failed: killed (killed)" in done["*"].stdout


def test_a_run_whose_config_is_damaged_or_lost_can_be_cancelled_and_its_log_read(
    study: Path, flowjobs: Command
) -> None:
    interrupted = Outcome("preempted", 75, "interrupted by Ctrl-C", kind="preempted")
    damaged, lost = (ended(study, name, interrupted) for name in ("damaged", "lost"))
    whole = ended(study, "whole", Outcome("finished", 0))
    for run in (damaged, whole):
        run.config_file.write_text("{")
    lost.config_file.unlink()
    log = damaged.logs / "7.log"
    log.write_text("its last words\n")
    damaged.add_submission("7", "local", log)
    assert flowjobs("logs", "damaged").stdout == "its last words\n"
    done = flowjobs("cancel", "damaged", "study/runs/lost")
    assert (done.returncode, done.stderr) == (0, "")
    for run in (damaged, lost):
        assert run.cancel_requested()
        assert run.status().state == "cancelled"
    # Whether a finished one was given more epochs is unknown: its record stays.
    unknown = flowjobs("cancel", "whole")
    assert (unknown.returncode, "config.json holds no JSON object" in unknown.stderr) == (2, True)
    assert whole.status().state == "finished"
    for name in ("damaged", "study/runs/damaged", "study/runs/lost"):
        asked = flowjobs("wait", name)
        assert (asked.returncode, "config.json " in asked.stderr) == (2, True), asked.stderr
    # What the error says to do works.
    assert "delete it and submit the run again with the options that it had" in unknown.stderr
    whole.best.touch()
    whole.config_file.unlink()
    again = flowjobs("submit", "--name", "whole", "--epochs", "1", "--wandb-mode", "disabled")
    assert (again.returncode, "whole is finished" in again.stdout) == (0, True), again.stderr
    done = flowjobs("retry", "d*", "whole", "--cluster", "local")
    assert (done.returncode, "nothing to start" in done.stdout) == (2, True)


def test_a_run_whose_files_are_damaged_can_be_removed_unless_it_is_trained(
    study: Path, flowjobs: Command
) -> None:
    finished = Outcome("finished", 0)
    damaged, torn, lost = (ended(study, name, finished) for name in ("damaged", "torn", "lost"))
    damaged.config_file.write_text("{")
    torn.status_file.write_text("{")
    lost.config_file.unlink()
    damaged.add_submission(
        *(str(os.getpid()), "local", None), identity={"process": process_mark(os.getpid())}
    )
    done = flowjobs("rm", "damaged", "torn", "--yes")
    assert (done.returncode, "damaged waits or runs" in done.stderr) == (2, True), done.stderr
    damaged.jobs_file.unlink()
    done = flowjobs("rm", "damaged", "torn", "lost", "--yes")
    assert done.returncode == 0, done.stderr
    assert not list((study / "runs").iterdir())


def test_rm_asks_and_leaves_no_half_of_a_run(
    study: Path, flowjobs: Command, tmp_path: Path
) -> None:
    here = without_checkpoints(study, "a")
    there, kept = (ended(study, name, Outcome("finished", 0)) for name in ("b", "c"))
    # The weights of the other are on scratch, beside something else.
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    there.checkpoints.rmdir()
    there.checkpoints.symlink_to(scratch)
    there.last.write_bytes(b"weights")
    (scratch / "notes.txt").write_text("mine")

    asked = flowjobs("rm", "a", "b")
    assert asked.returncode == 2
    assert "rm asks first, and stdin is not a terminal: add --yes" in asked.stderr
    assert "removes 2 runs: a, b" in asked.stdout
    assert here.exists()
    assert there.exists()
    assert answer("n") == 0
    assert here.exists()
    assert answer("y") == 0
    assert [path.name for path in (study / "runs").iterdir()] == ["c"]
    assert [path.name for path in (study / "checkpoints").iterdir()] == ["c"]
    assert [path.name for path in scratch.iterdir()] == ["notes.txt"]
    assert kept.exists()


def test_rm_of_a_run_whose_record_is_a_link_says_what_is_left(
    study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = without_checkpoints(study, "a")
    there = shutil.move(run.folder, tmp_path / "another-study-s")
    run.folder.symlink_to("/no-scratch/a")
    run.best.write_bytes(b"weights")
    with pytest.raises(ConfigError, match="a is a link to /no-scratch/a, which is not there"):
        remove(run)
    assert run.best.exists()
    run.folder.unlink()
    run.folder.symlink_to(there)
    assert size_of(run) == len(b"weights")
    remove(run)
    assert (run.folder.is_symlink(), run.checkpoints.exists()) == (False, False)
    assert (there / "config.json").exists()
    assert caplog.messages == [f"{run.folder} was a link: what is in {there} is left"]


def test_what_a_killed_rm_has_moved_is_no_rest_to_another_and_comes_back(study: Path) -> None:
    half, other = (ended(study, name, Outcome("finished", 0)) for name in ("half", "other"))
    half.best.write_bytes(b"weights")
    moved = half.checkpoints.rename(half.checkpoints.with_name(".removed-half-0123abcd"))
    remove(other)
    with pytest.raises(CheckpointGoneError, match=f"mv -T {moved} {half.checkpoints}"):
        half.check_files()
    remove(half)
    assert [*(study / "runs").iterdir(), *(study / "checkpoints").iterdir()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_rm_takes_each_run_from_wherever_its_parts_are_or_leaves_it_whole(study: Path) -> None:
    for name in ("record", "weights", "plain"):
        ended(study, name, Outcome("finished", 0)).best.write_bytes(b"weights")
    # What a rm that was killed has left is no run.
    for part in ("runs", "checkpoints"):
        shutil.copytree(study / part / "plain", study / part / ".removed-old-1")
    # Records and weights on file systems of their own; a mount point cannot be moved at all.
    script = """
cp -a study copy
for part in runs checkpoints; do
    mount -t tmpfs none study/$part && cp -a copy/$part/. study/$part || exit 9
done
mount --bind study/runs/record study/runs/record || exit 9
mount --bind study/checkpoints/weights study/checkpoints/weights || exit 9
"$0" -m flowjobs rm '*' --yes
code=$?
find study -name config.json -o -name best.pt | sort
exit $code
"""
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.findall(r"^error: (\w+): .*busy", done.stderr, re.M) == ["record", "weights"]
    assert done.stdout.splitlines()[1:] == [
        *(f"study/checkpoints/{name}/best.pt" for name in ("record", "weights")),
        *(f"study/runs/{name}/config.json" for name in ("record", "weights")),
    ]


def answer(word: str, first: Callable[[], object] = lambda: None) -> int:
    """Asked at a terminal, a person answers, after something else."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "flowjobs", "rm", "a", "b"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # what it removes: it asks now
        first()
        os.write(ours, f"{word}\n".encode())
        code = process.wait(240)
    os.close(ours)
    os.close(theirs)
    return code


def test_many_waiting_tasks_are_cancelled_by_one_command_of_slurm(
    slurm: SlurmCluster, site: object, study: Path, flowjobs: Command
) -> None:
    site("scancel", 'echo "$@" >> asked; $real "$@"')  # type: ignore[operator]
    held = ("--sbatch", "hold=True", "--name", "many")
    assert flowjobs(*SWEEP, *held).returncode == 0
    config = next(study.glob("runs/*/config.json"))
    content = config.read_text()
    config.write_text(content[:100])  # its job is cancelled all the same
    done = flowjobs("cancel", "many")
    assert done.returncode == 0, done.stderr
    config.write_text(content)
    assert done.stdout.count("cancelled job") == 3
    assert len(Path("asked").read_text().splitlines()) == 1
    wait_until(lambda: slurm.run("squeue", "-h", "-t", "PD,R") == "", "an empty queue", 30)
    planned = flowjobs("sweep", "many")
    assert "cancelled  3 (" in planned.stdout
    assert "nothing to submit" in planned.stdout
