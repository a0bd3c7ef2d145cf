"""How ranks of an attempt failed: each notes it in a file of its own before it leaves the others.

The first rank, which writes the run's status, sees no more of it than a connection that breaks.
"""

import time
from dataclasses import asdict, dataclass, field

from flowjobs.errors import RankFailedError
from flowjobs.from_json import from_json
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome

# The kind of an error that only says that another rank is gone.
LOST_CONNECTION = "lost connection"


@dataclass(frozen=True)
class RankFailure:
    """How one rank failed.

    Attributes:
        rank: The job's rank, from 0.
        host: The node of the rank.
        outcome: As of a run of that rank alone; its kind is LOST_CONNECTION if another rank is
            the cause.
        time: When, in seconds of the epoch, by that node's clock.
    """

    rank: int
    host: str
    outcome: Outcome
    time: float = field(default_factory=time.time)

    @property
    def is_consequence(self) -> bool:
        """Whether another rank's failure is the cause."""
        return self.outcome.kind == LOST_CONNECTION

    @property
    def reason(self) -> str:
        """Why, as a sentence that says which rank it was."""
        if self.is_consequence:
            return f"the ranks lost one another, and none says why: {self.outcome.reason}"
        if self.rank == 0:
            return self.outcome.reason
        return f"rank {self.rank} on {self.host}: {self.outcome.reason}"

    def as_error(self) -> RankFailedError:
        """What the first rank raises for it."""
        outcome = self.outcome
        return RankFailedError(self.reason, outcome.kind, outcome.exit_code, outcome.traceback)


def note_failure(run: Run, start: str, failure: RankFailure) -> None:
    """Write down how this rank failed.

    Args:
        run: The run.
        start: The job and its restart; see `JobInfo.start_id`.
        failure: How.

    Raises:
        OSError: It cannot be written.
    """
    write_json(run.rank_file(start, failure.rank), asdict(failure))


def noted_failures(run: Run, start: str) -> list[RankFailure]:
    """What the ranks of a job's start have noted; a file that is damaged is left out."""
    found = []
    # Listed anew: NFS remembers for a while that a file which was asked for by name is not there.
    for file in run.rank_files(start):
        try:
            found.append(from_json(RankFailure, read_json(file)))
        except (OSError, ValueError):
            continue
    return found
