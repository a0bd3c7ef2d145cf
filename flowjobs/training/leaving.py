"""All ranks leave at the same step, though a signal reaches each of them at another time."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import Work

from flowjobs.training.ranks import Ranks


@dataclass(frozen=True)
class Leave:
    """Why a run stops before its end.

    Attributes:
        reason: As a sentence for the log and the status.
        taken_over: Another attempt holds the run: nothing more may be written.
    """

    reason: str
    taken_over: bool = False


@dataclass(frozen=True)
class _Vote:
    """One boundary's vote, under way."""

    work: Work
    highest: Tensor
    mine: Leave | None


class Leaving:
    """Asks every rank at each boundary whether it wants to leave.

    A boundary is the end of a step, and within a validation of a batch. With several ranks the
    answer is the one to the boundary before: the votes travel while what is between is computed, so
    that neither a GPU nor another rank is waited for.

    Args:
        ranks: The processes that train together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._vote: _Vote | None = None

    def agreed(self, mine: Leave | None) -> Leave | None:
        """Every rank calls this at the same boundary and gets the same answer.

        Args:
            mine: What this rank wants; None to train on.
        """
        if self._ranks.world_size == 1:
            return mine
        decided = self._count()
        if decided is None:
            highest = torch.tensor(self._weight(mine), device="cpu")
            work = distributed.all_reduce(highest, distributed.ReduceOp.MAX, async_op=True)
            self._vote = _Vote(work, highest, mine)
        return decided

    def close(self) -> None:
        """Wait for a vote that is still under way; no one needs its result any more."""
        if self._vote is not None:
            self._vote.work.wait()
            self._vote = None

    def _weight(self, leave: Leave | None) -> int:
        if leave is None:
            return 0
        # The lowest rank's reason wins, but whoever has lost the run comes before any other.
        rank, world_size = self._ranks.rank, self._ranks.world_size
        return world_size - rank + (world_size if leave.taken_over else 0)

    def _count(self) -> Leave | None:
        if self._vote is None:
            return None
        vote, self._vote = self._vote, None
        vote.work.wait()
        highest = int(vote.highest)
        if highest == 0:
            return None
        box = [vote.mine]
        speaker = -highest % self._ranks.world_size
        distributed.broadcast_object_list(box, src=speaker, device=torch.device("cpu"))
        return box[0]
