"""Many runs as one Slurm array: which task is which, and that no task of it is half-known.

    STUDY/arrays/flowjobs-MARK/
        0, 1, …         links to the logs of each task's run, or of the pack of runs that it trains:
                        Slurm writes the task's output there
        task.pkl        what a task does; the same for all
        tasks.json      the folders of these, the array's name, and the cluster that it is for
        origin.json     from where and how it was submitted
        submission.sh   the batch file
        job.json        the job that it became; there once every run has noted its task

All but the last is there before sbatch is called, and the mark is in the job's comment and in the
names of its logs. Whoever dies in between leaves an array without `job.json`: a task of it that
starts notes itself, `settle` finds the job by its mark and notes the rest. Where its cluster has no
such job, `settle` removes the folder, and a job that should come of it all the same finds no runs.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowjobs.errors import ConfigError, SubmissionError
from flowjobs.jobs.origin import Origin, arrays_folder
from flowjobs.runs.file_lock import locked
from flowjobs.runs.files import flush_folder, read_json, write_json
from flowjobs.runs.pack import Pack, submittable_at
from flowjobs.runs.run import Run
from flowjobs.runs.submittable import Submission, Submittable
from flowjobs.slurm.cluster import cluster_name
from flowjobs.slurm.controller import ENDED, JobRow, queue
from flowjobs.slurm.submission import SBATCH_TIMEOUT_S, TAKEN_WITHIN_S, AcceptedJob, new_mark

SUBMIT_WAIT_S = 600.0
PREFIX = "flowjobs-"


@dataclass(frozen=True)
class Array:
    """An array of a study. What it holds is on disk."""

    study: Path
    mark: str

    @property
    def folder(self) -> Path:
        """`STUDY/arrays/flowjobs-MARK`."""
        return arrays_folder(self.study) / f"{PREFIX}{self.mark}"

    @property
    def job_file(self) -> Path:
        """The job that it became."""
        return self.folder / "job.json"

    @property
    def origin_file(self) -> Path:
        """From where and how it was submitted, for its user's eyes alone."""
        return self.folder / "origin.json"

    @property
    def tasks_file(self) -> Path:
        """What its tasks are, and which cluster it is for."""
        return self.folder / "tasks.json"

    def task_folder(self, task: str) -> Path:
        """The logs of a task's run or pack, by way of the array."""
        return self.folder / task

    def submitted_as(self, task: str) -> Submittable:
        """The run that a task is, or the pack.

        Raises:
            ConfigError: The array has no such task.
        """
        try:
            logs = os.readlink(self.task_folder(task))
        except OSError as error:
            raise ConfigError(f"{self.task_folder(task)}: {error.strerror}: no such task") from None
        return submittable_at(self.study, Path(logs).parent)

    def write(self, submitted: Sequence[Submittable], name: str, origin: Origin) -> None:
        """Make the folder: of what exists, in the order of the tasks."""
        self.folder.mkdir(parents=True)
        # Relative, so that a study can be moved.
        folders = [each.folder.relative_to(self.study) for each in submitted]
        for task, folder in enumerate(folders):
            self.task_folder(str(task)).symlink_to(Path("../..", folder, "logs"))
        tasks = [str(folder) for folder in folders]
        content = {"name": name, "cluster": cluster_name(), "tasks": tasks}
        write_json(self.tasks_file, content, flush=False)
        write_json(self.origin_file, asdict(origin), flush=False, mode=0o600)
        flush_folder(self.folder)

    def note(self, job: AcceptedJob) -> None:
        """Have every run note its task, and the array its job."""
        found = self._content()
        identity = self._identity(found["name"], job)
        for task, folder in enumerate(found["tasks"]):
            submitted = submittable_at(self.study, Path(folder))
            if not submitted.removed():  # else its task finds nothing to do
                self._note(str(task), submitted, job.job_id, identity)
        write_json(self.job_file, {"job_id": job.job_id, "tasks": len(found["tasks"]), **identity})

    def note_task(self, run: Submittable, job_id: str) -> None:
        """Have a run, or a pack, note the task that this process is, if nobody has yet."""
        cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
        if run.submission(job_id, cluster) is None:
            base, _, task = job_id.partition("_")
            job = AcceptedJob(base, cluster, self.mark)
            self._note(task, run, base, self._identity(self._content()["name"], job))

    def _note(self, task: str, run: Submittable, array_id: str, identity: dict[str, Any]) -> None:
        job_id = f"{array_id}_{task}"
        run.add_submission(job_id, "slurm", run.output_of(job_id), identity=identity)

    def _identity(self, name: str, job: AcceptedJob) -> dict[str, Any]:
        return {**job.identity(name), "array": self.folder.name}

    def _content(self) -> dict[str, Any]:
        try:
            found = read_json(self.tasks_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.tasks_file} cannot be read: {error}") from error
        return found

    def unknown_from(self, here: str) -> str:
        """Why it is unknown, where the cluster `here` has no job of it, whether there is one; empty
        if there is none."""
        if not self.tasks_file.exists():
            return ""  # whoever prepared it never came to sbatch
        cluster = self._content().get("cluster", "")
        if cluster == here:
            return ""
        of = f"the cluster {cluster}"
        if not cluster:
            of = "an unknown cluster (prepared by an older version, or while Slurm did not answer)"
        return (
            f"an array of {of} was prepared and not noted, and "
            f"{here or 'none'} answers here: whether its tasks wait there is unknown; repeat the "
            "command there, or, if you know that it has no such job, "
            f"rm -r {shlex.quote(str(self.folder))}"
        )

    def tasks_among(self, rows: Iterable[JobRow]) -> dict[str, JobRow]:
        """Those of its tasks that Slurm knows."""
        ours = (row for row in rows if self.mark in row.marks)
        return {row.job_id.partition("_")[2]: row for row in ours}

    def why_unknown(self, task: str, owner: int, here: str, rows: Sequence[JobRow]) -> str:
        """Why it is unknown of a task whether it waits or runs, while nobody has noted it; empty if
        it does not.

        Args:
            task: Its number.
            owner: The user whose array it is.
            here: Slurm's name of the cluster that answers.
            rows: What is in its queue, also of that user.
        """
        if tasks := self.tasks_among(rows):
            if task not in tasks or tasks[task].state in ENDED:
                return ""
            job_id = tasks[task].job_id.partition("_")[0]
            return (
                f"job {job_id} is an array that was submitted and not noted: the sweep's command "
                "once more notes it"
            )
        if why := self.unknown_from(here):
            return why
        if owner != os.getuid():
            return (
                f"user {owner} has prepared an array that is not noted: whether its tasks wait is "
                "unknown; have them repeat the sweep's command, or, if you know that it has no "
                f"job, rm -r {shlex.quote(str(self.folder))}"
            )
        age_s = time.time() - self.folder.stat().st_mtime
        if age_s < SBATCH_TIMEOUT_S + TAKEN_WITHIN_S:
            return (
                f"an array was prepared {age_s:.0f} s ago and sbatch may be taking it: ask again "
                f"in {SBATCH_TIMEOUT_S + TAKEN_WITHIN_S - age_s:.0f} s"
            )
        return ""

    def runs(self) -> dict[str, list[Run]]:
        """The runs that each of its tasks trains."""
        found = {}
        for task, folder in enumerate(self._content()["tasks"]):
            submitted = submittable_at(self.study, Path(folder))
            runs = submitted.runs if isinstance(submitted, Pack) else [Run.at(submitted.folder)]
            found[str(task)] = runs
        return found

    def remove(self) -> None:
        """Remove what was prepared: a job that comes of it nevertheless finds no runs."""
        for task in itertools.count():
            try:
                submitted = self.submitted_as(str(task))
            except ConfigError:
                break
            if isinstance(submitted, Pack):
                shutil.rmtree(submitted.folder, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def new_array(study: Path) -> Array:
    """An array with a mark of its own; nothing of it is on disk yet."""
    return Array(study, new_mark())


def array_at(folder: Path) -> Array:
    """The array whose folder is `folder`; the inverse of `Array.folder`."""
    return Array(folder.parents[1], folder.name.removeprefix(PREFIX))


def arrays_of(study: Path) -> list[Array]:
    """Every array of a study that was ever prepared and not undone."""
    return [array_at(folder) for folder in sorted(arrays_folder(study).glob(f"{PREFIX}*"))]


@contextlib.contextmanager
def submitting(study: Path) -> Iterator[list[str]]:
    """Submit arrays of a study while the block lasts, which nobody else does meanwhile.

    First what an earlier submission has left half done is completed or undone.

    Yields:
        What became of that, a line each.

    Raises:
        SubmissionError: That is unknown: Slurm does not answer.
        LockHeldError: Another process submits.
    """
    arrays_folder(study).mkdir(parents=True, exist_ok=True)
    with locked(arrays_folder(study) / ".lock", SUBMIT_WAIT_S, "to submit arrays"):
        yield _settle(study)


def unnoted_tasks(studies: Iterable[Path]) -> dict[Run, list[Submission]]:
    """Tasks of this user that wait or run and that nobody could note, by the run that each trains.

    Those that several runs share are left out: only once they are noted can one of these leave.
    Slurm is asked if there is an array that is not noted.

    Raises:
        SubmissionError: Slurm does not answer.
    """
    arrays = [array for study in studies for array, _ in _half_done(study)]
    rows = queue({os.getuid()}) if arrays else []
    found: dict[Run, list[Submission]] = {}
    for array in arrays:
        with contextlib.suppress(ConfigError):  # whoever submits hears of it
            runs = array.runs()
            for task, row in array.tasks_among(rows).items():
                if row.state not in ENDED and len(runs.get(task, ())) == 1:
                    (run,) = runs[task]
                    entry = Submission(
                        row.job_id,
                        "slurm",
                        submitted="",
                        log=str(run.output_of(row.job_id)),
                        slurm_cluster=row.cluster,
                        mark=array.mark,
                        array=array.folder.name,
                    )
                    found.setdefault(run, []).append(entry)
    return found


def in_unnoted_arrays(studies: Iterable[Path]) -> dict[Run, str]:
    """Runs of which a task may wait or run that nobody has noted, and what is known of that.

    Writes nothing. Slurm is asked if there are such arrays.
    """
    arrays = [each for study in studies for each in _half_done(study)]
    if not arrays:
        return {}
    here = cluster_name()
    rows: Sequence[JobRow] | SubmissionError
    try:
        rows = queue({os.getuid(), *(owner for _, owner in arrays)})
    except SubmissionError as error:
        rows = error
    found: dict[Run, str] = {}
    for array, owner in arrays:
        with contextlib.suppress(ConfigError):
            for task, runs in array.runs().items():
                if isinstance(rows, SubmissionError):
                    why = array.unknown_from(here) or str(rows)
                else:
                    why = array.why_unknown(task, owner, here, rows)
                if why:
                    found |= dict.fromkeys(runs, why)
    return found


def _half_done(study: Path) -> list[tuple[Array, int]]:
    """The arrays that have not become a job yet, as far as is noted, and whose they are."""
    found = []
    for array in arrays_of(study):
        with contextlib.suppress(FileNotFoundError):  # undone meanwhile
            if not array.job_file.exists():
                found.append((array, array.folder.stat().st_uid))
    return found


def _settle(study: Path) -> list[str]:
    arrays = [array for array, uid in _half_done(study) if uid == os.getuid()]
    rows = queue({os.getuid()}) if arrays else []
    here = cluster_name() if arrays else ""
    said = []
    for array in arrays:
        found = [row for row in rows if array.mark in row.marks]
        if found:
            job_id = found[0].job_id.partition("_")[0]
            array.note(AcceptedJob(job_id, found[0].cluster, array.mark))
            said.append(f"job {job_id} had been submitted and not noted: it is now")
        elif why := array.unknown_from(here):
            said.append(why)
        else:
            array.remove()
    return said
