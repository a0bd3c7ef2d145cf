"""Jobs submitted with plain sbatch: recorded when they start, resubmitted by the same command."""

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from flowjobs.errors import SubmissionError, SubmissionUnknownError
from flowjobs.jobs.deferred_signals import signals_deferred_until_noted
from flowjobs.jobs.origin import Origin, origin_of
from flowjobs.runs.files import FILES_AT_ONCE
from flowjobs.runs.run import Run, run_names
from flowjobs.runs.submittable import Submission, Submittable
from flowjobs.slurm.controller import JobRecord, job_record, write_batch_script
from flowjobs.slurm.options import (
    CONTINUES,
    SCRIPT_ARGUMENTS,
    SCRIPT_OUTPUT,
    environment_for_sbatch,
)
from flowjobs.slurm.requested import gres_of, options_of
from flowjobs.slurm.sacct import submit_line
from flowjobs.slurm.submission import AcceptedJob, cancelled_unless_noted, sbatch

# Options of sbatch that only accounting has, in the line that was typed. A dependency on certain
# jobs is over once the job has started.
TYPED = {
    "--signal": r"--signal[= ](\S+)",
    "--hint": r"--hint[= ](\S+)",
    "--threads-per-core": r"--threads-per-core[= ](\S+)",
    "--dependency": r"(?:--dependency[= ]|-d ?)(singleton)(?=\s|$)",
}


def known_log(run: Submittable, job_id: str) -> str | None:
    """The log of the job that this process is in, if the run has noted the job."""
    noted = run.submission(job_id, os.environ.get("SLURM_CLUSTER_NAME", ""))
    return noted.log or None if noted else None


def note_job(run: Submittable, job_id: str) -> str | None:
    """Note the job that this process is in, and how it can be submitted again, once a job.

    Where Slurm may not or cannot be asked now, by what the job itself knows: one that is not noted
    could not be cancelled.

    Returns:
        The file that its errors go to, with all that flowjobs and Slurm say; None if that is not
        known.
    """
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    if noted := run.submission(job_id, cluster):
        return noted.log or None
    arguments: list[str] = json.loads(os.environ.get(SCRIPT_ARGUMENTS, "[]"))
    again: list[str] = []
    output = errors = ""
    identity: dict[str, object] = {"slurm_cluster": cluster}
    try:
        record = job_record(job_id)
    except SubmissionError:
        output, errors = json.loads(os.environ.get(SCRIPT_OUTPUT, '["", ""]'))
        identity["job_name"] = os.environ.get("SLURM_JOB_NAME", "")
    else:
        if record is None:
            return None
        output, errors = (record.fields.get(name, "") for name in ("StdOut", "StdErr"))
        if record.fields.get("BatchFlag") in (None, "0"):
            return output or None  # a shell of salloc's, say: nothing to submit again
        again = _command(run, job_id, record, arguments)
        identity["job_name"] = record.fields.get("JobName", "")
        identity["handed_over"] = 0.0 if record.restarts else record.submitted
    log = errors or output
    identity["job_log"] = "" if output == log else output
    if not again:
        identity["script_arguments"] = arguments
    Origin.here().note(run, job_id)
    run.add_submission(
        job_id,
        "slurm",
        Path(log) if log else None,
        continues=os.environ.get(CONTINUES),
        again=again,
        identity=identity,
    )
    return log or None


def run_of_job(study: Path, job_id: str, arguments: Sequence[str]) -> Run | None:
    """The run that a job, or the one that it continues, has been noted for by its first start.

    Args:
        study: Where to look.
        job_id: The job.
        arguments: Those of its batch script. A job that a user submits out of another job has
            that one's variables, but not its arguments.
    """
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    ids = {job_id, os.environ.get(CONTINUES, job_id)}
    runs = [Run(study, name) for name in run_names(study)]

    def noted(run: Run) -> str:
        try:
            entries = [run.submission(each, cluster) for each in ids]
        except OSError:
            return ""  # it cannot be read now
        times = [entry.submitted for entry in entries if entry and has_arguments(entry)]
        return max(times, default="")

    def has_arguments(entry: Submission) -> bool:
        if entry.script_arguments is not None:
            return entry.script_arguments == [*arguments]
        command = entry.again
        return bool(command) and command[len(command) - len(arguments) :] == [*arguments]

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        noted_at = dict(zip(runs, threads.map(noted, runs), strict=True))
    # A cluster uses ids again: the job that was noted last is this one.
    newest = max(runs, key=noted_at.__getitem__, default=None)
    return newest if newest and noted_at[newest] else None


def resubmit(run: Submittable, entry: Submission, exclude: str | None) -> str:
    """Submit the job of an entry of `jobs.jsonl` again. Returns the new job's id.

    Raises:
        SubmissionError: sbatch refused; or how the job was submitted is not known.
    """
    if not entry.again:
        entry = replace(entry, again=_command_by_now(run, entry), script_arguments=None)
    command = list(entry.again)
    if exclude:
        before = [option for option in command if option.startswith("--exclude=")]
        nodes = f"{before[-1].partition('=')[2]},{exclude}" if before else exclude
        command.insert(1, f"--exclude={nodes}")
        command = [option for option in command if option not in before]
    # The new job must know what it is, also where jobs get no environment by default.
    as_it_ran = [command[0], "--export=ALL", *command[1:]]
    command = _with_what_was_typed(as_it_ran, entry)
    old = entry.job_id
    origin = origin_of(run, old)
    environment = environment_for_sbatch(origin.environment_here(), run.asked())
    log = Path(entry.log) if entry.log else None
    taken: AcceptedJob | None = None
    with signals_deferred_until_noted("slurm"), cancelled_unless_noted(lambda: taken):
        with origin.umask_and_limits():
            environment |= {CONTINUES: old, "PYTHON": origin.python}
            try:
                taken = sbatch(command, environment)
            except SubmissionUnknownError:
                raise
            except SubmissionError:  # one of several partitions may allow less than this one
                if sorted(command) == sorted(as_it_ran):
                    raise
                taken = sbatch(as_it_ran, environment)
        new = taken.job_id
        if any(option.startswith("--array=") for option in command):
            new = f"{new}_{old.partition('_')[2]}"
        identity = taken.identity(entry.job_name) | {"job_log": entry.job_log}
        origin.note(run, new)
        run.add_submission(new, "slurm", log, continues=old, again=entry.again, identity=identity)
    return new


def _with_what_was_typed(command: Sequence[str], entry: Submission) -> list[str]:
    """The command with what Slurm's record of a job that runs lacks (see TYPED), and of several
    partitions those that the job does not run in."""
    typed = _typed_options(entry)
    words = enumerate(command[1:], 1)
    end = next((n for n, word in words if not word.startswith("-")), len(command))
    lists = re.findall(r"(?<=\s)(?:--partition[= ]|-p ?)(\S+)", _in_script(command[end:]) + typed)
    options = [
        f"{option}={found[-1]}"
        for option, pattern in TYPED.items()
        if (found := re.findall(rf"(?<=\s){pattern}", typed))
    ]
    for option in command[1:end]:
        name, _, value = option.partition("=")
        listed = name == "--partition" and lists and value in lists[-1].split(",")
        options.append(f"{name}={lists[-1]}" if listed else option)
    return [command[0], *options, *command[end:]]


def _in_script(script: Sequence[str]) -> str:
    """The options that a batch script, the first of the words, asks for; empty if it is gone."""
    try:
        lines = Path(script[0]).read_text(errors="replace").splitlines() if script else []
    except OSError:
        return ""
    return " ".join(line[7:] for line in lines if line.startswith("#SBATCH")) + " "


def _typed_options(entry: Submission) -> str:
    """The options that a job was submitted with, by accounting; empty if it does not say."""
    line = submit_line(entry.job_id)
    script = next((word for word in entry.again if word.endswith(f"/{entry.job_id}.sh")), "")
    words, arguments = line.split(), entry.again[entry.again.index(script) + 1 :] if script else []
    tail = " ".join(arguments).split()
    if words[len(words) - len(tail) :] != tail:
        return ""  # another job, of an earlier cluster with the same ids
    return " ".join(words[: len(words) - len(tail) - 1])


def _command_by_now(run: Submittable, entry: Submission) -> list[str]:
    """The command of a job that Slurm did not tell of as it began, if it tells of it now."""
    record = job_record(entry.job_id)
    command = _command(run, entry.job_id, record, entry.script_arguments or []) if record else []
    if not command:
        raise SubmissionError(
            f"with which options job {entry.job_id} was submitted is not known, Slurm did not say: "
            f"submit {run.name} again as you did"
        )
    return command


def _command(
    run: Submittable, job_id: str, record: JobRecord, arguments: Sequence[str]
) -> list[str]:
    """The command that submits a job again; empty if Slurm does not give its script.

    Args:
        run: Which keeps the script.
        job_id: The job.
        record: Slurm's, of it.
        arguments: As the script got them: in its record of the command Slurm quotes nothing.
    """
    script = run.logs / f"{job_id}.sh"
    if not write_batch_script(job_id, str(script)):
        return []
    options = options_of(record.fields)
    if wanted := gres_of(record.fields):
        # Slurm says gres:gpu:1 for what was asked as --gpus-per-node=1 or as --gres=gpu:1, and
        # adds one to the other: only the one that the script has is replaced.
        if b"--gpus-per-node" in script.read_bytes():
            options.append(f"--gpus-per-node={wanted.removeprefix('gpu:')}")
        else:
            options.append(f"--gres={wanted}")
    return ["sbatch", "--open-mode=append", *options, str(script), *arguments]
