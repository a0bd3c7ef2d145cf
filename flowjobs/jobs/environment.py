"""Where this process runs: under which scheduler, as which rank of how many."""

import contextlib
import dataclasses
import logging
import math
import os
import random
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.job_environment import JobEnvironment
from submitit.local.debug import DebugJobEnvironment
from submitit.local.local import LocalJobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from flowjobs.errors import SubmissionError
from flowjobs.jobs import plain_sbatch
from flowjobs.jobs.array import array_at
from flowjobs.runs.hint import hint
from flowjobs.runs.process import parent_of, process_mark
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.runs.submittable import Submittable
from flowjobs.slots import JOB_OF_RUN, SLOTS, submitted_for_run
from flowjobs.slurm.client import MARK
from flowjobs.slurm.controller import job_record
from flowjobs.slurm.options import ARRAY, CONTINUES

logger = logging.getLogger(__name__)

# What srun gives the processes of a step, and no batch script has of its own. The next srun takes
# the last three for its options.
OF_A_STEP = re.compile(r"SLURM_(STEP|SRUN|PTY|CPU_BIND|MEM_BIND|DISTRIBUTION)\w*")
# What a job has of its own where a field of its record says so, and otherwise of the job that it
# was submitted from.
FIELDS = {
    "SLURM_RESTART_COUNT": "Restarts",
    "SLURM_ARRAY_JOB_ID": "ArrayJobId",
    "SLURM_ARRAY_TASK_ID": "ArrayJobId",
    "SLURM_MEM_PER_CPU": "MinMemoryCPU",
    "SLURM_MEM_PER_NODE": "MinMemoryNode",
    "SLURM_MEM_PER_GPU": "MemPerTres",
    "SLURM_GPUS": "TresPerJob",
    "SLURM_GPUS_PER_NODE": "TresPerNode",
    "SLURM_GPUS_PER_TASK": "TresPerTask",
    "SLURM_TRES_PER_TASK": "TresPerTask",
    "SLURM_CPUS_PER_GPU": "CpusPerTres",
}


@dataclass(frozen=True)
class JobProcess:
    """This process as a part of its job.

    Attributes:
        job: What the run's status says of the job.
        rank: This process among all of the job, from 0.
        world_size: How many there are.
        local_rank: This process among those on its node, from 0.
        start_id: This start of the job, by the same name for all its ranks.
    """

    job: JobInfo
    start_id: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def this_process(run: Submittable) -> JobProcess:
    """Look up where this process runs, and set MASTER_ADDR and MASTER_PORT if it is one of many.

    A process in the foreground is a job of its own, also inside a Slurm job that was not submitted
    for the run: that one is the user's, and only lends its ranks.
    """
    forget_what_is_not_here()
    environment = _submitit_environment()
    if environment is None:
        alone = dataclasses.replace(_in_foreground(run), ranks=1)
        return JobProcess(alone, alone.start_id)
    if environment.num_tasks > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        # A site's nodes may let only some ports through.
        port = os.environ.get("FLOWJOBS_MASTER_PORT") or _master_port(environment.job_id)
        os.environ["MASTER_PORT"] = str(port)
    job = dataclasses.replace(_job_of(environment, run), ranks=environment.num_tasks)
    # In a user's own job each rank is a job of its own to us; the step id is their common start.
    step = f"{environment.job_id}.{os.environ.get('SLURM_STEP_ID')}"
    return JobProcess(
        job,
        step if job.cluster == "none" else job.start_id,
        rank=environment.global_rank,
        world_size=environment.num_tasks,
        local_rank=environment.local_rank,
    )


def _master_port(job_id: str) -> int:
    """Where the ranks of this start of a job meet; the same on all of them.

    Not submitit's: a port of the range that Linux gives to any connection, and the same one again
    at the job's next start; or what the shell had, which others of its jobs have too.
    """
    start = [os.environ.get(name) for name in ("SLURM_RESTART_COUNT", "SLURM_STEP_ID")]
    return random.Random(f"{job_id} {start}").randrange(20_000, 32_768)


def forget_what_is_not_here() -> None:
    """Drop variables that a job inherits from where it was submitted, and that do not hold in it.

    A temporary folder of the login node, which wandb-core trusts blindly, and a token for Slurm,
    which has run out when the job ends: on a node, Slurm's commands need none.
    """
    if not Path(os.environ.get("TMPDIR", "/")).is_dir():
        del os.environ["TMPDIR"]
    if submitted_for_run():
        os.environ.pop("SLURM_JWT", None)


def forget_submitting_job() -> None:
    """Drop what a batch script that was submitted from inside another job has of that one.

    Plain sbatch passes all variables on, and Slurm replaces those alone that the new job has too.
    Its id it always has, and Slurm says the rest; if it is silent, the variables are believed.
    """
    if JOB_OF_RUN in os.environ:  # of a run's job, which may have continued another
        os.environ.pop(CONTINUES, None)
    in_step = "SLURM_STEP_ID" in os.environ
    for name in [*os.environ]:
        of_run = name in (JOB_OF_RUN, ARRAY, SLOTS) or name.startswith("SUBMITIT_")
        if of_run or (in_step and OF_A_STEP.fullmatch(name)):
            del os.environ[name]
    in_doubt = [name for name in FIELDS if name in os.environ]
    if not (in_doubt and "SLURM_JOB_ID" in os.environ):
        return
    try:
        record = job_record(os.environ["SLURM_JOB_ID"])
    except SubmissionError as error:
        logger.warning("%s: taken as its environment has it", error)
        return
    for name in in_doubt:
        if record and record.fields.get(FIELDS[name], "0") == "0":
            del os.environ[name]


def _job_of(environment: JobEnvironment, run: Submittable) -> JobInfo:
    if environment.name() == "slurm" and not submitted_for_run():
        return _in_foreground(run)
    return JobInfo(
        cluster=environment.name(),
        job_id=environment.job_id,
        log=_log_file(environment, run),
        # Slurm's name of the node; the host's own may have a domain, which --exclude refuses.
        host=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        pid=os.getpid(),
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        restart=_restarts(environment, run),
        continues=CONTINUES in os.environ,
        packed=SLOTS in os.environ,
        process=process_mark(os.getpid()),
    )


def _in_foreground(run: Submittable) -> JobInfo:
    return JobInfo.in_foreground(run.logs / f"{socket.gethostname()}-{os.getpid()}.log")


def _submitit_environment() -> JobEnvironment | None:
    # submitit goes by a variable that a job inherits if it is submitted from inside one of ours.
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and not submitted_for_run():
        del os.environ["SUBMITIT_EXECUTOR"]
    # A step with a terminal is a shell, whatever number of tasks it asked for to get its cores.
    ranks = "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PTY_PORT" not in os.environ
    if "SUBMITIT_EXECUTOR" not in os.environ and ranks:
        os.environ["SUBMITIT_EXECUTOR"] = "slurm"
    for kind in (DebugJobEnvironment, LocalJobEnvironment, SlurmJobEnvironment):
        environment: JobEnvironment = kind()
        if environment.activated():
            return environment
    return None


def is_batch_script(arguments: Sequence[str]) -> bool:
    """Whether this process is the batch script of its job, or does its work.

    sbatch/*.sh may as well be run with bash in a terminal of a notebook, or under srun. The
    variables do not tell: a job that is submitted from inside a step inherits that one's.

    Args:
        arguments: Those of sbatch/*.sh. A batch script that got the same has us started by another
            program (`conda run`, `timeout`); a notebook's got others, or none.
    """
    task = os.environ.get("SLURM_TASK_PID", "")
    has_the_same = bool(arguments) and _arguments_of(task)[-len(arguments) :] == [*arguments]
    if task not in (str(os.getpid()), str(os.getppid())) and not has_the_same:
        return False
    try:
        slurmstepd = Path(f"/proc/{parent_of(int(task))}/cmdline").read_text(errors="replace")
    except OSError:
        return True  # hidden from users (hidepid): no other step is known to have started it
    return re.search(r"slurmstepd: \[\S+\.(?!batch\])", slurmstepd) is None


def _arguments_of(pid: str) -> list[str]:
    try:
        command = Path(f"/proc/{int(pid)}/cmdline").read_text(errors="surrogateescape")
    except (OSError, ValueError):
        return []
    return command.split("\0")[:-1]


def batch_script_job(run: Submittable) -> JobInfo:
    """The job whose batch script has started this process, outside of srun."""
    forget_what_is_not_here()
    job_id = batch_script_job_id()
    return JobInfo(
        cluster="slurm",
        job_id=job_id,
        log=plain_sbatch.known_log(run, job_id),
        host=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        pid=os.getpid(),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        continues=CONTINUES in os.environ,
    )


def batch_script_job_id() -> str:
    """Its id (`12_3` for an array task)."""
    if array_id := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array_id}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def is_first_start() -> bool:
    """Whether the user asked for this start: it does not continue or restart an earlier one."""
    if not submitted_for_run():
        return True
    return CONTINUES not in os.environ and int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0


def waited_while_cancelled(run: Run) -> bool:
    """Whether the job that this process is in was submitted by hand before its run was cancelled.

    `flowjobs cancel` does not know such a job as long as it waits.
    """
    cancelled_at = run.cancelled_at()
    if cancelled_at is None or not submitted_for_run():
        return False
    try:
        record = job_record(os.environ["SLURM_JOB_ID"])
    except SubmissionError as error:  # never restart what may have been cancelled
        logger.warning(
            "%s was cancelled, and whether this job was submitted before that or since is unknown "
            "(%s): it does not start; `%s` from where Slurm answers resumes the run",
            run.name,
            error,
            hint("resume", run.name, study=run.study),
        )
        return True
    # Slurm knows it to the second: one that was submitted right after is wanted.
    return record is not None and record.submitted < math.floor(cancelled_at)


def _restarts(environment: JobEnvironment, run: Submittable) -> int:
    if environment.name() == "slurm":
        return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return run.starts_of(environment.job_id)


def _log_file(environment: JobEnvironment, run: Submittable) -> str | None:
    if SLOTS in os.environ:
        return plain_sbatch.known_log(run, environment.job_id)
    if "SUBMITIT_FOLDER" in os.environ:
        log = run.logs / environment.paths.stdout.name
        if environment.name() == "slurm" and environment.global_rank == 0:
            if ARRAY in os.environ:
                array_at(Path(os.environ[ARRAY])).note_task(run, environment.job_id)
            else:
                _note_itself(run, environment.job_id, log)
        return str(log)
    if environment.name() == "slurm":
        note = plain_sbatch.note_job if environment.global_rank == 0 else plain_sbatch.known_log
        return note(run, environment.job_id)
    return None


def _note_itself(run: Submittable, job_id: str, log: Path) -> None:
    """Note the job that this process is in, if its submitter has not: it may be dead."""
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    if run.submission(job_id, cluster) is not None:
        return
    identity = {"slurm_cluster": cluster}
    with contextlib.suppress(SubmissionError):  # its mark, where nodes may ask for it
        if record := job_record(job_id):
            identity["job_name"] = record.fields.get("JobName", "")
            if marks := MARK.findall(record.fields.get("Comment", "")):
                identity["mark"] = marks[-1]  # after the user's own comment
    continues = os.environ.get(CONTINUES)
    run.add_submission(job_id, "slurm", log, continues=continues, identity=identity)
