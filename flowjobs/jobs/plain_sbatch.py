"""Jobs submitted with plain sbatch: recorded when they start, resubmitted by the same command."""

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flowjobs.errors import SubmissionError
from flowjobs.jobs.deferred_signals import signals_deferred_until_noted
from flowjobs.jobs.origin import Origin, origin_of
from flowjobs.runs.files import FILES_AT_ONCE
from flowjobs.runs.run import Run, run_names
from flowjobs.runs.submittable import Submission, Submittable
from flowjobs.slurm.controller import JobRecord, job_record, write_batch_script
from flowjobs.slurm.options import CONTINUES, SCRIPT_ARGUMENTS, environment_for_sbatch
from flowjobs.slurm.requested import gres_of, options_of
from flowjobs.slurm.sacct import submit_line
from flowjobs.slurm.submission import AcceptedJob, cancelled_unless_noted, sbatch


def known_log(run: Submittable, job_id: str) -> str | None:
    """The output file of the job that this process is in, if the run has noted the job."""
    noted = run.submission(job_id, os.environ.get("SLURM_CLUSTER_NAME", ""))
    return noted.log or None if noted else None


def note_job(run: Submittable, job_id: str) -> str | None:
    """Note how the job that this process is in can be submitted again, once a job.

    Returns:
        Its output file; None if Slurm does not say.
    """
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    if noted := run.submission(job_id, cluster):
        return noted.log or None
    try:
        record = job_record(job_id)
    except SubmissionError:
        return None
    if record is None:
        return None
    log = record.fields.get("StdOut")
    if record.fields.get("BatchFlag") in (None, "0"):
        return log  # a shell of salloc's, say: nothing to submit again
    again: list[str] = []
    script = run.logs / f"{job_id}.sh"
    Origin.here().note(run, job_id)
    if write_batch_script(job_id, str(script)):
        again = _command(record, script)
    continues = os.environ.get(CONTINUES)
    identity = {
        "job_name": record.fields.get("JobName", ""),
        "slurm_cluster": cluster,
        "handed_over": 0.0 if record.restarts else record.submitted,
    }
    file = Path(log) if log else None
    run.add_submission(job_id, "slurm", file, continues=continues, again=again, identity=identity)
    return log


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
        times = [entry.submitted for entry in entries if entry and same_arguments(entry.again)]
        return max(times, default="")

    def same_arguments(command: Sequence[str]) -> bool:
        return bool(command) and [*command[len(command) - len(arguments) :]] == [*arguments]

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        noted_at = dict(zip(runs, threads.map(noted, runs), strict=True))
    # A cluster uses ids again: the job that was noted last is this one.
    newest = max(runs, key=noted_at.__getitem__, default=None)
    return newest if newest and noted_at[newest] else None


def resubmit(run: Submittable, entry: Submission, exclude: str | None) -> str:
    """Submit the job of an entry of `jobs.jsonl` again. Returns the new job's id.

    Raises:
        SubmissionError: sbatch refused.
    """
    command = list(entry.again)
    if exclude:
        before = [option for option in command if option.startswith("--exclude=")]
        nodes = f"{before[-1].partition('=')[2]},{exclude}" if before else exclude
        command.insert(1, f"--exclude={nodes}")
        command = [option for option in command if option not in before]
    command[1:1] = _signal_of(entry)
    # The new job must know what it is, also where jobs get no environment by default.
    command.insert(1, "--export=ALL")
    old = entry.job_id
    origin = origin_of(run, old)
    environment = environment_for_sbatch(origin.environment_here(), run.asked())
    log = Path(entry.log) if entry.log else None
    taken: AcceptedJob | None = None
    with signals_deferred_until_noted("slurm"), cancelled_unless_noted(lambda: taken):
        with origin.umask_and_limits():
            taken = sbatch(command, environment | {CONTINUES: old, "PYTHON": origin.python})
        new = taken.job_id
        if any(option.startswith("--array=") for option in command):
            new = f"{new}_{old.partition('_')[2]}"
        identity = taken.identity(entry.job_name)
        origin.note(run, new)
        run.add_submission(new, "slurm", log, continues=old, again=entry.again, identity=identity)
    return new


def _signal_of(entry: Submission) -> list[str]:
    """The --signal that a job was submitted with: Slurm's record has none, the script another."""
    line = submit_line(entry.job_id)
    script = next((word for word in entry.again if word.endswith(f"/{entry.job_id}.sh")), "")
    words, arguments = line.split(), entry.again[entry.again.index(script) + 1 :] if script else []
    tail = " ".join(arguments).split()
    if words[len(words) - len(tail) :] != tail:
        return []  # another job, of an earlier cluster with the same ids
    options = " ".join(words[: len(words) - len(tail) - 1])
    found = re.findall(r"(?<=\s)--signal[= ](\S+)", options)
    return [f"--signal={found[-1]}"] if found else []


def _command(record: JobRecord, script: Path) -> list[str]:
    options = options_of(record.fields)
    if wanted := gres_of(record.fields):
        # Slurm says gres:gpu:1 for what was asked as --gpus-per-node=1 or as --gres=gpu:1, and
        # adds one to the other: only the one that the script has is replaced.
        if b"--gpus-per-node" in script.read_bytes():
            options.append(f"--gpus-per-node={wanted.removeprefix('gpu:')}")
        else:
            options.append(f"--gres={wanted}")
    # As the script got them: in its record of the command Slurm quotes nothing.
    arguments = json.loads(os.environ.get(SCRIPT_ARGUMENTS, "[]"))
    return ["sbatch", "--open-mode=append", *options, str(script), *arguments]
