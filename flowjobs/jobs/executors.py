"""submitit's executors, each given what a run asks of its cluster."""

import itertools
import os
import pickle
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from submitit.core.core import Executor
from submitit.core.utils import DelayedSubmission
from submitit.local.debug import DebugExecutor
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor

from flowjobs.config import SlurmConfig
from flowjobs.errors import ConfigError, SubmissionError
from flowjobs.jobs.array import Array
from flowjobs.runs.files import replaced_whole
from flowjobs.runs.pack import FOLDER as PACKS
from flowjobs.runs.pack import Pack
from flowjobs.runs.run import Run
from flowjobs.runs.submittable import BATCH_FILE, TASK, Submittable
from flowjobs.slots import JOB_OF_RUN, nvidia_gpus
from flowjobs.slurm.client import controller_answers
from flowjobs.slurm.cluster import partitions
from flowjobs.slurm.options import ARRAY, export_for, srun_options
from flowjobs.slurm.submission import AcceptedJob, sbatch

# A signal that comes before python has handlers would kill it, and Slurm would call the job failed:
# blocked ones wait until there are some. Before 2019, env could not do that.
SETUP = (
    "# Slurm may have been told to pass on nothing to srun, which then finds no program.",
    f"export PATH SLURM_EXPORT_ENV=ALL {JOB_OF_RUN}=$SLURM_JOB_ID",
    "guard=",
    'block="$(command -v env) --block-signal=TERM --block-signal=USR2"',
    "$block true 2>/dev/null && guard=$block",
)

Cluster = Literal["slurm", "local", "debug"]

# Flags that mean nothing on a machine without Slurm.
OF_SLURM = (
    *("--partition", "--account", "--qos", "--constraint", "--exclude", "--gpu-type", "--comment"),
    "--sbatch",
)

# submitit's local executor ends a job after two minutes unless told otherwise.
NO_LIMIT_MIN = 60 * 24 * 365
CUDA_NAME = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")


def choose_cluster(asked: Literal["auto", "slurm", "local", "debug"]) -> tuple[Cluster, str]:
    """The cluster to submit to, and why.

    Raises:
        SubmissionError: Slurm was asked for and does not answer; or there is a cluster, whose
            controller is away: a run that is meant for it is not trained on its login node.
    """
    if asked in ("local", "debug"):
        return asked, f"--cluster {asked}"
    answers, why = controller_answers()
    if asked == "slurm" and not answers:
        raise SubmissionError(
            f"--cluster slurm: {why}; submit from a login node, or use --cluster local"
        )
    if answers is None:
        raise SubmissionError(
            f"{why}; nothing was submitted: try again when it is back, or train on this machine "
            "with --cluster local"
        )
    return ("slurm", why) if answers else ("local", why)


def check_meant_for_here(
    chosen: tuple[Cluster, str], flags: Collection[str], runs: Iterable[Run]
) -> None:
    """Raise a SubmissionError where runs that are meant for Slurm would be trained here unasked:
    on a login node, say, as cron's PATH lacks sbatch.

    Args:
        chosen: What `choose_cluster` said.
        flags: Those on the command line: a flowjobs.toml is for machines without Slurm as well.
        runs: Those to start.
    """
    cluster, why = chosen
    if cluster != "local" or why.startswith("--cluster"):
        return
    option = next((f"{flag} is an option of Slurm" for flag in OF_SLURM if flag in flags), "")
    for run in runs:
        newest = run.newest_job()
        of_slurm = newest and newest.cluster == "slurm"
        if found := option or (of_slurm and f"{run.name} was last submitted to Slurm"):
            raise SubmissionError(
                f"{found}, and {why}: mend that (PATH, say), or train on this machine with "
                "--cluster local"
            )


class SlurmExecutorAnywhere(SlurmExecutor):
    """submitit's, with our way of calling sbatch; it can also be made where there is no Slurm, to
    look at its batch file.

    Not by submitit's `submit()` or `batch()`: these move what a job does into its place after
    sbatch, so that a job whose submitter dies there finds nothing to do.

    Args:
        folder: Where the logs go; "%a" in it stands for the number of an array's task.
        python: The command that starts python, for a shell.
        prepared: Where that is which has to be there before sbatch is called.

    Attributes:
        accepted: The job, once sbatch has accepted it.
    """

    accepted: AcceptedJob | None = None

    def __init__(self, folder: Path, python: str, prepared: Path) -> None:
        super().__init__(folder=folder, python=python)
        self._prepared = prepared.absolute()  # as submitit has the other

    @classmethod
    def affinity(cls) -> int:
        """See submitit; `choose_cluster` has asked the controller by then."""
        return 2

    def batch_file(self) -> str:
        """The text that a submission hands to sbatch."""
        return self._make_submission_file_text(self._submitit_command_str, uid="")

    def call_sbatch(self, task: Callable[[], None], mark: str | None = None) -> AcceptedJob:
        """Submit the job; see also `accepted`.

        Args:
            task: What the job does, or each task of the array.
            mark: See `submission.sbatch`.

        Raises:
            SubmissionError: sbatch refused; the text has its words and what could be meant.
            SubmissionUnknownError: Whether it has taken the job is unknown.
        """
        delayed = DelayedSubmission(task)
        delayed.set_timeout(self.parameters.get("time") or NO_LIMIT_MIN, self.max_num_timeout)
        # Whole: an earlier job of the run may just start.
        with replaced_whole(self._prepared / TASK, flush=False) as pickled:
            pickled.write(pickle.dumps(delayed))
        file = self._prepared / BATCH_FILE
        with replaced_whole(file, flush=False) as text:
            text.write(self.batch_file().encode())
        comment = self.parameters.get("comment")
        options = [f"--comment={comment}"] if comment else []
        try:
            self.accepted = sbatch(["sbatch", *options, str(file)], os.environ, mark)
        except SubmissionError as error:
            if "invalid partition" in str(error).lower():
                asked, known = self.parameters.get("partition"), ", ".join(partitions())
                said = f"{error}; --partition {asked} is not one of {known}"
                raise SubmissionError(said) from error
            raise
        return self.accepted

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text = str(super()._make_submission_file_text(command, uid))
        # In the names of logs Slurm fills in what follows a %, also where a folder is called so.
        log = "/%j" if self.folder == self._prepared else "/%a/%A_%a"
        quoted = str(self._prepared).replace("'", "'\"'\"'")  # as a shell's quotes have it
        return text.replace(f"{quoted}{log}", f"{quoted.replace('%', '%%')}{log}")


def here_executor(cluster: Cluster, run: Submittable, asked: SlurmConfig) -> Executor:
    """The executor for a job of this machine, whose files are in the run's folder.

    Raises:
        ConfigError: More is asked for than this machine has.
    """
    if cluster == "debug":
        return DebugExecutor(folder=run.logs)
    gpus = check_local(asked)
    executor = LocalExecutorWithGpus(run.logs, gpus)
    executor.update_parameters(
        tasks_per_node=max(1, len(gpus)),
        timeout_min=asked.timeout_min or NO_LIMIT_MIN,
        signal_delay_s=asked.signal_before_end_s,
        stderr_to_stdout=True,
    )
    return executor


def check_study(study: Path) -> None:
    """Raise a ConfigError if the names of logs in a study would not be taken as they are."""
    if found := re.search(r"%[jtAa]", str(study)):
        raise ConfigError(
            f"--study {study}: found {found[0]}, which stands for a job's id in the names of "
            "logs; expected a path without it"
        )


def slurm_executor(
    run: Submittable, asked: SlurmConfig, python: str = sys.executable
) -> SlurmExecutorAnywhere:
    """The executor for a job of Slurm.

    Not submitit's AutoExecutor: that one cannot leave out what submitit sets by default, a wckey
    and a time limit of five minutes.
    """
    executor = SlurmExecutorAnywhere(run.logs, _guarded(python), prepared=run.logs)
    kind = f"{PACKS}/" if isinstance(run, Pack) else ""
    executor.update_parameters(
        **_parameters(run.name, asked),
        setup=[*SETUP, *_link_task(run.logs, f"{shlex.quote(str(run.logs))}/${{SLURM_JOB_ID}}")],
        teardown=_teardown(shlex.quote(f"{kind}{run.name}"), run.study, python),
    )
    return executor


def array_executor(
    array: Array, name: str, asked: SlurmConfig, python: str
) -> SlurmExecutorAnywhere:
    """The executor for an array of Slurm, each task of which is a run, or several that share it."""
    check_study(array.study)
    # submitit puts the task's number in the place of %a, as Slurm does.
    folder = array.folder / "%a"
    executor = SlurmExecutorAnywhere(folder, _guarded(python), prepared=array.folder)
    task = f"{shlex.quote(str(array.folder))}/$SLURM_ARRAY_TASK_ID"
    job = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    executor.update_parameters(
        **_parameters(name, asked),
        setup=[
            *SETUP,
            f"export {ARRAY}={shlex.quote(str(array.folder))}",
            *_link_task(array.folder, f"{task}/{job}"),
            "# runs/NAME, or packs/NAME",
            f'submitted=$(readlink {task} | sed "s,^[./]*,,; s,/logs$,,")',
        ],
        teardown=_teardown('"$submitted"', array.study, python),
    )
    return executor


def _link_task(prepared: Path, job: str) -> list[str]:
    task = shlex.quote(str(prepared / TASK))
    return ["# What it does, where submitit looks for it.", f"ln -sf {task} {job}_submitted.pkl"]


def _guarded(python: str) -> str:
    return f"$guard {shlex.quote(python)}"


def _parameters(name: str, asked: SlurmConfig) -> dict[str, Any]:
    options = dict(asked.sbatch)
    if "no-requeue" not in options:
        options = {"requeue": True, **options}
    if exported := export_for(os.environ, asked):
        options["export"] = exported
    # submitit's own line has the signal that SUBMITIT_PREEMPT_SIGNAL names.
    options["signal"] = f"USR2@{asked.signal_before_end_s}"
    memory = asked.mem_gb
    typed = f"{asked.gpu_type}:{asked.gpus_per_node}" if asked.gpu_type else asked.gpus_per_node
    gpus = typed if asked.gpus_per_node else None
    return {
        "job_name": name,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "exclude": asked.exclude,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_per_node,
        "gpus_per_node": gpus,
        "cpus_per_task": asked.cpus_per_task,
        "mem": None if memory is None else f"{round(memory * 1024)}M",
        "time": asked.timeout_min,
        "comment": asked.sbatch.get("comment", asked.comment),
        "wckey": None,
        "stderr_to_stdout": True,
        "srun_args": srun_options(asked.cpus_per_task),
        "additional_parameters": options,
    }


def _teardown(run: str, study: Path, python: str) -> list[str]:
    command = f"{shlex.quote(python)} -m flowjobs reconcile {run} --study {shlex.quote(str(study))}"
    return [
        "code=$?",
        "# If the attempt did not record how it ended: record it, and restart the run if allowed.",
        f"[ $code -eq 0 ] || {command} --exit-code $code",
        "exit $code",
    ]


class LocalExecutorWithGpus(LocalExecutor):
    """submitit's, for GPUs by any name that CUDA_VISIBLE_DEVICES may hold.

    submitit's own takes indices only, and a machine may name its GPUs by UUID.

    Args:
        folder: Where the job's files go.
        gpus: CUDA's names of the GPUs that the job gets.
    """

    def __init__(self, folder: Path, gpus: Sequence[str]) -> None:
        super().__init__(folder=folder)
        self._gpus = gpus

    def _submit_command(self, command: str) -> LocalJob[Any]:
        # submitit puts its list of indices into the same variable just before.
        gpus = ["env", f"CUDA_VISIBLE_DEVICES={','.join(self._gpus)}"]
        job: LocalJob[Any] = super()._submit_command(f"{shlex.join(gpus)} {command}")
        return job


def check_local(asked: SlurmConfig) -> list[str]:
    """The GPUs that a job on this machine gets.

    Raises:
        ConfigError: More is asked for than this machine has.
    """
    if asked.nodes > 1:
        raise ConfigError(f"--nodes: found {asked.nodes}; without Slurm there is this machine only")
    visible = visible_gpus()
    # The default of one GPU means "if there is one"; more than there are is a mistake.
    if asked.gpus_per_node > max(1, len(visible)):
        raise ConfigError(
            f"--gpus-per-node: found {asked.gpus_per_node}, this machine has {len(visible)}"
        )
    gpus = visible[: asked.gpus_per_node]
    if len(gpus) > 1 and any(name.startswith("MIG-") for name in gpus):
        raise ConfigError(
            f"--gpus-per-node: found {asked.gpus_per_node}; a process sees one MIG instance only, "
            "and those of a run see the same"
        )
    return gpus


def ranks_of(cluster: Cluster, asked: SlurmConfig) -> int:
    """How many processes would train a run together."""
    match cluster:
        case "slurm":
            return asked.nodes * asked.tasks_per_node
        case "local":
            return max(1, len(check_local(asked)))
        case "debug":
            return 1


def visible_gpus() -> list[str]:
    """The GPUs of this machine that a job may use. Looked up without loading torch.

    Returns:
        What CUDA_VISIBLE_DEVICES names, an index, a UUID or a MIG instance each; else the index of
        every GPU.
    """
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return [str(index) for index in range(nvidia_gpus())]
    names = (name.strip() for name in asked.split(","))
    # CUDA sees those before the first that is none: "-1", "NoDevFiles" and "" hide all.
    return list(itertools.takewhile(CUDA_NAME.fullmatch, names))
