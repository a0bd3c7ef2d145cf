"""The ranks of a run: one process per GPU, joined by torch.distributed, and their votes to leave.

Knows no scheduler: what this process's job was given is for `flowjobs.slots` to say.
"""

import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import Work

from flowjobs.data.randomness import derive_seed
from flowjobs.errors import ConfigError, RankFailedError
from flowjobs.slots import gpus_given, in_slurm_job, nvidia_gpus

logger = logging.getLogger(__name__)

# How long a rank waits for what another one does alone: the first takes the run, sets damaged
# files aside and saves. Slurm tells them at once if a rank dies.
WAIT_FOR_RANKS = timedelta(minutes=30)
LEAVE_WITHIN_S = 10.0

# What the first rank tells those that wait for it.
DONE, FAILED, STILL_AT_IT = 0, 1, 2


@dataclass(frozen=True)
class Ranks:
    """This process among those that train the run together.

    Attributes:
        rank: This process, from 0.
        world_size: How many there are.
        device: What this process computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @contextmanager
    def first_goes_first(self) -> Iterator[Callable[[], None]]:
        """The other ranks enter the block when the first one has left it.

        Yields:
            What the first one calls every now and then where the block may take longer than
            WAIT_FOR_RANKS. No effect on the others.

        Raises:
            RankFailedError: The first one failed there.
        """
        if self.world_size == 1:
            yield lambda: None
            return
        if not self.is_first:
            word = STILL_AT_IT
            while word == STILL_AT_IT:
                word = _from_first()
            if word == FAILED:
                raise RankFailedError("the first rank failed before a step was trained")
            yield lambda: None
            return
        try:
            yield lambda: _tell(STILL_AT_IT)
        except BaseException:
            with suppress(RuntimeError):  # the others are gone
                _tell(FAILED)
            raise
        _tell(DONE)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar tensor over the ranks."""
        return self.sum(value) / self.world_size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks; the same bits on each."""
        if self.world_size > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def have_same(self, text: str) -> bool:
        """Whether all ranks have the same text; the same answer on each."""
        mine = torch.tensor([derive_seed(text)], device="cpu")
        first = mine.clone()
        self.take_from_first([first])
        return not bool(self.sum((mine != first).long()))

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Write the first rank's values into these tensors on all."""
        if self.world_size > 1:
            for tensor in tensors:
                value = tensor.contiguous()
                distributed.broadcast(value, src=0)
                tensor.copy_(value)


def _tell(word: int) -> None:
    distributed.broadcast(torch.tensor([word], device="cpu"), src=0)


def _from_first() -> int:
    word = torch.zeros(1, dtype=torch.int64, device="cpu")
    distributed.broadcast(word, src=0)
    return int(word)


def single_process(device: torch.device) -> Ranks:
    """A run of one process."""
    return Ranks(rank=0, world_size=1, device=device)


@contextmanager
def joined_ranks(rank: int, world_size: int, local_rank: int, use_gpu: bool) -> Iterator[Ranks]:
    """Pick this process's device and, where there are several, join the others.

    Uses NCCL for tensors on GPUs and gloo for those on CPUs. With several ranks, MASTER_ADDR and
    MASTER_PORT must be in the environment.

    Args:
        rank: This process among all, from 0.
        world_size: How many there are.
        local_rank: This process among those on the node, from 0: its GPU.
        use_gpu: Compute on a GPU if there is one.
    """
    device = torch.device("cpu")
    named = use_gpu and os.environ.get("CUDA_VISIBLE_DEVICES")
    if named and not torch.cuda.is_available():
        if torch.version.cuda and (nvidia_gpus() or gpus_given()):
            # A GPU that was lost must not turn the run into one on the CPU, with other bits.
            raise RuntimeError(
                "CUDA error: the job was given a GPU, and torch finds none (nvidia-smi on the node "
                "says why; with --gpus-per-node 0 a run trains on the CPU)"
            )
        if nvidia_gpus():
            _say_build_without_cuda()
    if use_gpu and torch.cuda.is_available():
        # A job step may see all of the node's GPUs or its own alone.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world_size == 1:
        yield single_process(device)
        return
    # Functions in there take the group that exists when they are imported as a default, and keep
    # it and its threads beyond its end; DDP would import them when there is one. A thread of gloo
    # that lets go of a tensor while Python ends aborts the process.
    importlib.import_module("torch.distributed.nn")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    # Tensors on the CPU go through gloo in both cases: flags that no GPU should wait for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=WAIT_FOR_RANKS)
    try:
        if use_gpu:
            on_gpu = device.type == "cuda"
            gpu = torch.cuda.get_device_properties(device).uuid if on_gpu else f"none of {rank}"
            check_own_gpus(str(gpu), world_size)
        yield Ranks(rank, world_size, device)
    finally:
        _leave_group()


def check_own_gpus(gpu: str, world_size: int) -> None:
    """Raise a ConfigError on every rank where two have one GPU, which NCCL refuses.

    It would say so at the first sum, in an error like that of a GPU that was lost.

    Args:
        gpu: This rank's, as no other is called.
        world_size: How many ranks there are.
    """
    mine = torch.tensor([derive_seed(gpu)], device="cpu")
    gpus = [torch.zeros_like(mine) for _ in range(world_size)]
    distributed.all_gather(gpus, mine)
    ranks_on: dict[int, list[str]] = {}
    for rank, known in enumerate(gpus):
        ranks_on.setdefault(int(known), []).append(str(rank))
    for ranks in ranks_on.values():
        if len(ranks) > 1:
            raise ConfigError(
                f"ranks {' and '.join(ranks)} have one GPU between them, expected one each: ask "
                "for as many GPUs (--gpus-per-node) as tasks on a node (--ntasks-per-node)"
            )


def _say_build_without_cuda() -> None:
    """Say that torch computes on the CPU alone: a ConfigError where a job holds a GPU for it."""
    found = f"torch {torch.__version__} is a build without CUDA, which cannot use the GPU"
    if in_slurm_job():
        raise ConfigError(
            f"{found} that the job was given: install torch's CUDA build, or give "
            "--gpus-per-node 0 to train on the CPU"
        )
    logger.warning("%s of this machine: training on the CPU", found)


def _leave_group() -> None:
    # Beside: where another rank is dead or hangs, NCCL may wait for it.
    leaving = threading.Thread(
        target=distributed.destroy_process_group, name="leave-group", daemon=True
    )
    leaving.start()
    leaving.join(LEAVE_WITHIN_S)
    if leaving.is_alive():
        logger.warning("the group of ranks could not be left within %g s", LEAVE_WITHIN_S)


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

    def wait(self) -> None:
        """Wait for a vote that is still under way, whose result nobody needs any more."""
        if self._vote is not None:
            self._vote.work.wait()
            self._vote = None

    def _weight(self, leave: Leave | None) -> int:
        if leave is None:
            return 0
        # The lowest rank's reason wins, but whoever has lost the run comes before any other. Equal
        # to -rank modulo world_size, so that _count gets the speaker back from the maximum.
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
