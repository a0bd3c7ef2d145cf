"""The cause of a death that could not speak, from what its batch script and its log say."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.config import RunConfig
from flowjobs.errors import CheckpointError, CheckpointWriteError, DataError, RankFailedError
from flowjobs.jobs import exit_cause
from flowjobs.jobs.environment import JobProcess
from flowjobs.runs.rank_failures import RankFailure, note_failure, noted_failures
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome
from flowjobs.slots import SLOTS
from flowjobs.slurm.controller import JobRow
from flowjobs.slurm.jobs import Known


def died(study: Path, exit_code: int | None, log: str = "") -> tuple[str, str, int, str]:
    run = Run(study, "a")
    run.create(RunConfig())
    path = run.logs / "12_0_log.out"
    path.write_text(log)
    job = JobInfo("local", "12", str(path), "n3", 1)
    attempt = AttemptRecord(4, job, "now", first_step=0, last_step=12_400)
    outcome = exit_cause.cause_of(run, attempt, exit_code)
    return outcome.state, outcome.kind, outcome.exit_code, outcome.reason


@pytest.mark.parametrize(
    ("exit_code", "kind", "told_as"),
    [
        (137, "killed", 137),
        (139, "segmentation fault", 139),
        (-11, "segmentation fault", 139),  # as Python's subprocess has it
        (134, "aborted", 134),
        (135, "bus error", 135),
        (136, "signal", 136),  # SIGFPE
        (3, "exception", 3),
        # A program's own codes, whatever signals have these numbers.
        (9, "exception", 9),
        (11, "exception", 11),
        (12, "exception", 12),
        (15, "exception", 15),
        (255, "exception", 255),  # exit(-1)
    ],
)
def test_an_exit_code_names_the_death(study: Path, exit_code: int, kind: str, told_as: int) -> None:
    state, found, code, reason = died(study, exit_code)
    assert (state, found, code) == ("failed", kind, told_as)
    assert reason.endswith("on n3, attempt 4, step 12,400")


def test_memory_is_told_with_its_figures(study: Path) -> None:
    log = (
        "00:00:00 I attempt 4 at a: slurm job 12 on n3\n"
        "slurmstepd-n3: error: Step 12.0 exceeded memory limit (65712345088 > 64424509440), "
        "being killed\n"
    )
    state, kind, _, reason = died(study, 137, log)
    assert (state, kind) == ("failed", "out of memory")
    assert reason == "out of memory: 61.2 of 60 GiB on n3, attempt 4, step 12,400"
    study.rename(study.with_name("moved"))
    job = JobInfo("local", "12", str(study / "runs/a/logs/12_0_log.out"), "n3", 1)
    moved = Run(study.with_name("moved"), "a")
    assert exit_cause.cause_of(moved, AttemptRecord(4, job, "now")).kind == "out of memory"


def test_what_an_earlier_attempt_died_of_is_not_taken_for_this_ones(study: Path) -> None:
    log = (
        "slurmstepd-n3: error: Detected 1 oom-kill event(s) in StepId=12.0.\n"
        "00:00:00 I attempt 4 at a: slurm job 12 on n3\n"
    )
    assert died(study, 137, log)[1] == "killed"
    assert died(study, 137, log + "Detected 1 oom_kill event in StepId=12.0\n")[1] == (
        "out of memory"
    )


def test_a_signal_before_there_was_a_handler_is_a_preemption(study: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        assert died(study, 128 + number)[:3] == ("preempted", "preempted", 75)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("PREEMPTED", "preempted"),
        ("NODE_FAIL", "node failure"),
        ("BOOT_FAIL", "node failure"),
        ("TIMEOUT", "time limit"),
        ("OUT_OF_MEMORY", "out of memory"),
        ("CANCELLED", "cancelled"),
        # Waited too long for what its user has set with --deadline: a new job would be too late.
        ("DEADLINE", "never started"),
        ("FAILED", "never started"),
    ],
)
def test_slurm_tells_what_ended_a_job_whose_run_could_not_start(state: str, kind: str) -> None:
    row = JobRow("12", state, os.getuid(), "c", "a", submitted=1.0, ended=2.0, restarts=0)
    job = JobInfo("slurm", "12", None, "n3", 1)
    outcome = exit_cause.cause_of_no_start(job, answer=Known(row))
    assert outcome.kind == kind
    assert "job 12 " in outcome.reason
    assert (state == "DEADLINE") == ("--deadline" in outcome.reason)


def test_a_job_without_a_log_names_its_node_and_where_that_could_not_write(study: Path) -> None:
    log = study / "runs/a/logs/12_0_log.out"
    job = JobInfo("slurm", "12", str(log), "login", 1)  # as it was submitted
    row = JobRow("12", "FAILED", os.getuid(), "c", "a", submitted=1.0, ended=2.0, nodes="n7")
    early = "job 12 ended before the run could start on n7: "
    no_log = f"{early}it has no log, so it seems that the node could not write to {log.parent}"
    assert exit_cause.cause_of_no_start(job, answer=Known(row)).reason == no_log
    log.parent.mkdir(parents=True)
    log.write_text("ImportError: no torch\n")
    said = exit_cause.cause_of_no_start(job, answer=Known(row)).reason
    assert said == f"{early}ImportError: no torch"
    row = replace(row, state="DEADLINE", nodes="None assigned")  # it has had no node
    said = exit_cause.cause_of_no_start(job, answer=Known(row)).reason
    assert said.startswith("job 12 ended before the run could start: its --deadline")


def raised_from(error: Exception, number: int) -> Exception:
    middle = RuntimeError("the reader failed")
    middle.__cause__ = OSError(number, os.strerror(number))
    error.__cause__ = middle
    return error


# How torch ends each error of CUDA.
OF_EVERY_ERROR = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call.\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), "file system"),
        (OSError(errno.ESTALE, "Stale file handle"), "file system"),
        (CheckpointWriteError("no space"), "file system"),
        (raised_from(CheckpointError("last.pt cannot be read"), errno.ESTALE), "file system"),
        (raised_from(DataError("train.pt cannot be read"), errno.EIO), "file system"),
        (raised_from(DataError("train.pt cannot be read"), errno.ESHUTDOWN), "file system"),
        (raised_from(CheckpointError("last.pt cannot be read"), errno.ECONNREFUSED), "file system"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "file system"),
        (raised_from(DataError("train.pt cannot be read"), errno.EACCES), None),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA error: out of memory"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory"),
        (RuntimeError("NCCL error: Last error: Cuda failure 2 'out of memory'"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "lost GPU"),
        (RuntimeError(f"CUDA error: unspecified launch failure{OF_EVERY_ERROR}"), "lost GPU"),
        (RuntimeError(f"CUDA error: out of memory{OF_EVERY_ERROR}"), "out of memory"),
        (RuntimeError("failed to listen, code: -98, name: EADDRINUSE"), "address in use"),
        (RuntimeError(f"CUDA error: device-side assert triggered{OF_EVERY_ERROR}"), None),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("bug"), None),
    ],
)
def test_only_what_may_pass_is_worth_another_try(error: Exception, kind: str | None) -> None:
    assert exit_cause.transient_kind(error) == kind


ASSERTED = (
    "../aten/src/ATen/native/cuda/IndexKernel.cu:93: operator(): block: [0,0,0], thread: [0,0,0] "
    "Assertion `-sizes[i] <= index && index < sizes[i]` failed.\n"
)


@pytest.mark.parametrize(
    ("text", "own", "by_mps", "kind"),
    [
        ("CUDA error: device-side assert triggered", True, False, "exception"),
        ("CUDA error: device-side assert triggered", False, False, "exception"),
        # What computes next may be a library that says it in its own words.
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", True, False, "exception"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", False, False, "lost GPU"),
        # By MPS the others are told of it as well.
        ("CUDA error: device-side assert triggered", True, True, "exception"),
        ("CUDA error: device-side assert triggered", False, True, "lost GPU"),
        ("CUDA error: unspecified launch failure", False, True, "lost GPU"),
        ("a bug of the model", True, True, "exception"),
    ],
)
def test_an_assert_on_the_gpu_is_the_mistake_of_the_run_whose_log_has_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    own: bool,
    by_mps: bool,
    kind: str,
) -> None:
    log = tmp_path / "12_0_log.out"
    before = f"00:00:00 I attempt 1 at a: local job 12 on n1\n{ASSERTED}"
    log.write_text(f"{before}00:00:00 I attempt 2 at a: local job 12 on n1\n{ASSERTED * own}")
    if by_mps:
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps")
        monkeypatch.setenv(SLOTS, "2")
    job = JobInfo("local", "12", str(log), "n1", 1)
    failure = exit_cause.failure_of(RuntimeError(text), JobProcess(job, job.start_id))
    assert failure.outcome.kind == kind
    assert ("by MPS" in failure.reason) == (by_mps and kind == "lost GPU")


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH])
def test_a_connection_that_the_users_code_did_not_get_is_an_exception_of_it(number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as refused:  # as the user's code would
        raise OSError(number, os.strerror(number))
    assert exit_cause.transient_kind(refused.value) is None
    # Of a file it is its server.
    refused.value.filename = "rows.npy"
    assert exit_cause.transient_kind(refused.value) == "file system"


def test_an_error_that_fails_to_say_its_text_is_told_all_the_same() -> None:
    class OwnError(RuntimeError):
        def __str__(self) -> str:
            raise IndexError(self.args)

    outcome = exit_cause.failure_of(OwnError(), process(0)).outcome
    assert (outcome.kind, outcome.reason) == ("exception", "OwnError: <exception str() failed>")


def test_the_node_to_leave_out_is_the_one_whose_process_died_first(tmp_path: Path) -> None:
    log = tmp_path / "12_0_log.out"
    run, job = Run(tmp_path, "a"), JobInfo("slurm", "12", str(log), "n1", 1)
    before = "00:00:00 I attempt 1 at a: slurm job 12 on n9\nsrun: error: n9: task 3: Killed\n"
    before += "00:00:00 I attempt 2 at a: slurm job 12 on n1\n"
    log.write_text(before + "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Aborted\n")
    assert exit_cause.failed_node(run, job) == "n2"
    log.write_text(before + "srun: error: n[1-2]: tasks 0-1: Killed\n")
    assert exit_cause.failed_node(run, job) == "n1"
    own = RankFailure(3, "n4", Outcome("failed", 1, "bug"))
    run.logs.mkdir(parents=True)
    note_failure(run, job.start_id, own)
    assert exit_cause.failed_node(run, job) == "n4"


GLOO = "[/gloo/transport/tcp/pair.cc:554] Connection closed by peer [10.0.0.2]:4321"
NCCL = "NCCL error: ncclRemoteError: A call failed, possibly since a remote process exited"
KILLED = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n"


def process(rank: int) -> JobProcess:
    job = JobInfo("slurm", "12", None, f"n{rank + 1}", 1)
    return JobProcess(job, job.start_id, rank, world_size=3)


@pytest.mark.parametrize(
    ("errors", "log", "expected"),
    [
        ({0: RuntimeError(GLOO), 1: ValueError("bug")}, "", (1, "exception", "n2")),
        ({1: ValueError("bug"), 0: RuntimeError(NCCL)}, KILLED, (1, "exception", "n2")),
        # In the order in which they failed.
        ({2: ValueError("bug"), 1: ValueError("its echo")}, "", (2, "exception", "n3")),
        ({1: RuntimeError("CUDA error: uncorrectable ECC error")}, "", (1, "lost GPU", "n2")),
        ({1: OSError(errno.EIO, "Input/output error")}, "", (1, "file system", "n2")),
        ({1: SystemExit(3)}, "", (1, "exception", "n2")),
        # One that could note nothing.
        ({0: RuntimeError(GLOO), 2: RankFailedError("gone")}, KILLED, (1, "killed", "n2")),
        ({}, "srun: error: n2: task 1: Aborted (core dumped)\n", (1, "aborted", "n2")),
        ({}, "srun: error: n3: task 2: Exited with exit code 15\n", (2, "exception", "n3")),
        # Nothing is known: the others follow from one that nobody names.
        ({0: RuntimeError(NCCL), 1: RuntimeError(GLOO)}, "", None),
        ({}, "srun: error: n2: task 1: Terminated\nsrun: error: n1: task 0: Killed\n", None),
    ],
)
def test_the_rank_that_failed_first_of_its_own_accord_tells(
    study: Path, errors: dict[int, BaseException], log: str, expected: tuple[int, str, str] | None
) -> None:
    run = Run(study, "a")
    run.create(RunConfig())
    job = replace(process(0).job, log=str(run.logs / "12_0_log.out"))
    Path(job.log or "").write_text(f"00:00:00 I attempt 1 at a: slurm job 12 on n1\n{log}")
    for rank, error in errors.items():
        note_failure(run, job.start_id, exit_cause.failure_of(error, process(rank)))
    note_failure(run, "12-1", RankFailure(0, "n9", Outcome("failed", 1, "of another start")))
    run.rank_file(job.start_id, 7).write_text("{ torn")
    found = exit_cause.first_failure(noted_failures(run, job.start_id), job)
    assert (found and (found.rank, found.outcome.kind, found.host)) == expected
