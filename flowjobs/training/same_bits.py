"""Whether two runs ended with the same bits."""

from collections.abc import Iterator
from typing import Any

import torch

from flowjobs.errors import CheckpointError
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint


def differences(run: Run, other: Run) -> list[str]:
    """What differs between two runs, to the last bit.

    Compared are last.pt and best.pt (weights, EMA, optimizer, schedule, counters) and every row
    of metrics.jsonl.
    """
    found = []
    for mine, theirs in ((run.last, other.last), (run.best, other.best)):
        try:
            first, second = read_checkpoint(mine), read_checkpoint(theirs)
        except CheckpointError as error:
            found.append(str(error))
            continue
        parts = first.keys() | second.keys()
        found += [
            f"{mine.name}: {part}"
            for part in sorted(parts)
            if not equal_to_the_bit(first.get(part), second.get(part))
        ]
    if list(read_rows(run.metrics_file)) != list(read_rows(other.metrics_file)):
        found.append(run.metrics_file.name)
    return found


def equal_to_the_bit(first: Any, second: Any) -> bool:
    """Whether two payloads, of nested dicts and lists of tensors, are equal to the last bit."""
    match first:
        case torch.Tensor():
            return (
                isinstance(second, torch.Tensor)
                and first.dtype == second.dtype
                and (first.shape, first.layout) == (second.shape, second.layout)
                # Not torch.equal: it takes 0.0 and -0.0 for the same.
                and all(map(torch.equal, _bytes(first), _bytes(second)))
            )
        case dict():
            return first.keys() == second.keys() and all(
                equal_to_the_bit(first[k], second[k]) for k in first
            )
        case list() | tuple():
            return len(first) == len(second) and all(map(equal_to_the_bit, first, second))
    return bool(first == second)


def _bytes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    for part in _parts(tensor.detach().cpu()):
        yield part.reshape(-1).contiguous().view(torch.uint8)


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The dense tensors that a tensor, a sparse one too, is kept as."""
    match tensor.layout:
        case torch.sparse_coo:
            tensor = tensor.coalesce()
            return tensor.indices(), tensor.values()
        case torch.sparse_csr | torch.sparse_bsr:
            return tensor.crow_indices(), tensor.col_indices(), tensor.values()
        case torch.sparse_csc | torch.sparse_bsc:
            return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)
