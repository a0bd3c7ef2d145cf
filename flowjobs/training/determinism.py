"""Bits that do not depend on chance on a GPU. A CPU gives the same ones by default."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# One of the two values with which cuBLAS promises the same bits; this one takes 24 MiB of the GPU
# and the other may cost speed.
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
CUBLAS_WORKSPACE = ":4096:8"


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Use only deterministic algorithms while the block lasts, and what was set before after it.

    On a CPU this costs nothing and changes no bit of what flowjobs computes. cuBLAS reads its
    variable when CUDA starts in this process, so the block begins before the first tensor on the
    GPU.

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
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace or CUBLAS_WORKSPACE
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
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
