"""Bits that do not depend on chance on a GPU. A CPU gives the same ones by default."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# One of the two values with which cuBLAS promises the same bits; this one takes 24 MiB of the GPU
# and the other may cost speed.
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
CUBLAS_WORKSPACE = ":4096:8"


def set_cublas_workspace() -> None:
    """Let cuBLAS give the same bits, unless its variable is set already.

    Before the first matrix product on a GPU in this process: torch looks at the variable there, and
    keeps the answer, whether deterministic algorithms are on by then or not. So it stays set.
    """
    if not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Use only deterministic algorithms while the block lasts, and what was set before after it.

    On a CPU this costs nothing and changes no bit of what flowjobs computes. On a GPU
    `set_cublas_workspace` comes before.

    Args:
        wanted: Whether to; if not, nothing is changed.
    """
    if not wanted:
        yield
        return
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True)
    # A write to every new tensor, only to find code that reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(was_on, warn_only=was_warning)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
