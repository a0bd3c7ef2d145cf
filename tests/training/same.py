"""Equality of checkpoints to the last bit."""

from typing import Any

import torch


def same(first: Any, second: Any) -> bool:
    """Whether two payloads are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)
