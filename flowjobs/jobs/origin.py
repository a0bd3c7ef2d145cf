"""What a job was submitted from: kept beside it, so that a restart does not depend on who asks.

`reconcile` runs in cron's directory with cron's environment, or as a colleague; a run started again
from there would find neither its modules nor its credentials.
"""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flowjobs.config import SlurmConfig
from flowjobs.errors import SubmissionError
from flowjobs.from_json import from_json
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.hint import hint
from flowjobs.runs.pack import Pack
from flowjobs.runs.submittable import Submission, Submittable
from flowjobs.slots import SLOTS, submitted_for_run
from flowjobs.slurm.jobs import JobIdentity, user_name

# Valid in one process or session only, and wrong in another job; the token for Slurm expires.
OF_A_SESSION = ("WANDB_SERVICE", "SLURM_JWT", SLOTS)

# What a job gets of the process that calls sbatch, unless its site says otherwise, by Slurm's names
# (PropagateResourceLimits).
LIMITS = {
    name: int(getattr(resource, f"RLIMIT_{name}"))
    for name in ("AS", "CORE", "CPU", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC", "RSS", "STACK")
}


@dataclass(frozen=True)
class Origin:
    """Where and how a job was submitted.

    Attributes:
        folder: The working directory.
        python: The interpreter.
        environment: All variables.
        options: What was asked of the cluster; None for a job by hand, which has a command.
        umask: Which permissions new files lack; None if that was not noted.
        limits: Its soft limits (`ulimit -S`), by Slurm's names; -1 for none.
    """

    folder: str
    python: str
    environment: Mapping[str, str]
    options: SlurmConfig | None = None
    umask: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def here(cls, options: SlurmConfig | None = None) -> "Origin":
        """This process as an origin."""
        kept = {name: text for name, text in os.environ.items() if name not in OF_A_SESSION}
        umask = os.umask(0o077)  # there is no other way to ask
        os.umask(umask)
        limits = {name: resource.getrlimit(number)[0] for name, number in LIMITS.items()}
        return cls(os.getcwd(), sys.executable, kept, options, umask, limits)

    def environment_here(self) -> dict[str, str]:
        """What a job that is submitted from here now inherits: what tells Slurm's commands which
        cluster to ask, and who asks, is of the place and the moment."""
        inherited = dict(self.environment)
        # An origin keeps no token, which is a login and expires: the one of now.
        here = {name: os.environ[name] for name in ("SLURM_JWT",) if os.environ.get(name)}
        # A node that gets its settings from the controller has not the login node's file.
        if not os.path.exists(inherited.get("SLURM_CONF", "/")):
            del inherited["SLURM_CONF"]
            here |= {name: os.environ[name] for name in ("SLURM_CONF",) if os.environ.get(name)}
        return inherited | here

    @contextlib.contextmanager
    def umask_and_limits(self) -> Iterator[None]:
        """While the block lasts this process has them, for sbatch to take them over: the umask, and
        no lower limits, as far as this process may have these."""
        umask = None if self.umask is None else os.umask(self.umask)
        before: dict[int, tuple[int, int]] = {}
        try:
            for name in LIMITS.keys() & self.limits.keys():
                soft, hard = resource.getrlimit(LIMITS[name])
                wanted = min(self.limits[name], hard, key=_height)
                if _height(wanted) > _height(soft):
                    resource.setrlimit(LIMITS[name], (wanted, hard))
                    before[LIMITS[name]] = soft, hard
            yield
        finally:
            for number, limit in before.items():
                resource.setrlimit(number, limit)
            if umask is not None:
                os.umask(umask)

    def note(self, run: Submittable, job_id: str) -> None:
        """Keep it beside the job, for this user's eyes alone: there may be tokens in it."""
        write_json(run.origin_file(job_id), asdict(self), mode=0o600)


def _height(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def arrays_folder(study: Path) -> Path:
    """Where a study keeps the arrays that it was submitted as; see `jobs.array`."""
    return study / "arrays"


def origin_of(run: Submittable, job_id: str) -> Origin:
    """What a job of the run was submitted from.

    Raises:
        SubmissionError: It cannot be known, or is another user's.
    """
    path = _file(run, job_id)
    check_own(run, job_id)
    try:
        return from_json(Origin, read_json(path))
    except FileNotFoundError:
        if os.environ.get("SLURM_JOB_ID") == job_id and submitted_for_run():
            return Origin.here(run.asked())  # its own environment is as good
        raise SubmissionError(
            f"there is no record of what job {job_id} was submitted from ({path}): "
            f"submit {run.name} again from where you did"
        ) from None
    except (OSError, ValueError) as error:
        raise SubmissionError(f"{path} cannot be read ({error}): submit {run.name} again") from None


def check_own(run: Submittable, job_id: str) -> None:
    """Raise a SubmissionError if another user has submitted the job: it is theirs to restart."""
    try:
        owner = _file(run, job_id).stat().st_uid
    except FileNotFoundError:
        return
    if owner != os.getuid():
        name = user_name(owner)
        again = hint("reconcile", run.name, study=run.study)
        raise SubmissionError(
            f"job {job_id} was submitted by {name}, and is not started again under another "
            f"account: {name} can, by `{again}` or by submitting it"
        )


def _file(run: Submittable, job_id: str) -> Path:
    """Where the origin of a job is noted: once for all that are trained by it, or by its array."""
    entry = run.submission(job_id)
    if entry and entry.array:
        return arrays_folder(run.study) / entry.array / "origin.json"
    if entry and entry.pack:
        return Pack(run.study, entry.pack).origin_file(job_id)
    return run.origin_file(job_id)


def identity_of(run: Submittable, job_id: str, log: str | None = None) -> JobIdentity:
    """The identity of a Slurm job of the run, as it was noted; else what its attempt says of it."""
    return identity_among(run.submissions(), job_id, log)


def identity_among(entries: Sequence[Submission], job_id: str, log: str | None) -> JobIdentity:
    """The same, from the run's submissions."""
    noted = [entry for entry in entries if entry.job_id == job_id]
    return noted_identity(noted[-1]) if noted else JobIdentity(job_id, log=log or "")


def noted_identity(entry: Submission) -> JobIdentity:
    """The identity of a Slurm job, as it was noted."""
    return JobIdentity(
        job_id=entry.job_id,
        mark=entry.mark,
        cluster=entry.slurm_cluster,
        uid=entry.uid,
        name=entry.job_name,
        submitted=entry.handed_over,
        log=entry.job_log or entry.log,
    )
