"""What a run takes of the GPU's memory, and what is said where there is too little."""

import gc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowjobs.errors import RunInterrupted
from flowjobs.jobs.exit_cause import OUT_OF_GPU_MEMORY, transient_kind
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import bytes_of, read_checkpoint
from tests.gpu.runs import CONFIG, train, val_losses
from tests.gpu.test_own_models import Net

pytestmark = pytest.mark.gpu

# What no GPU has.
TOO_MUCH_GIB = 1024


class Greedy(Net):
    """Asks for too much in its third step."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls == 3:
                x = x + x.new_zeros(TOO_MUCH_GIB * 2**28)[: len(x), None]
        return super().forward(x, t)


def test_out_of_memory_is_told_with_what_was_asked_and_what_is_free(
    study: Path, device: torch.device
) -> None:
    run = Run(study, "a")
    config = replace(CONFIG, arch=f"{__name__}:Greedy", width=None, depth=None)
    with pytest.raises(torch.OutOfMemoryError) as error:
        train(run, config, device)
    assert transient_kind(error.value) == "out of memory"
    status = run.status()
    assert (status.state, status.exit_code) == ("failed", 1)
    assert OUT_OF_GPU_MEMORY.search(status.reason)  # what `sweep retry` goes by
    assert "test_memory.py" in status.reason
    assert f"Tried to allocate {TOO_MUCH_GIB}.00 GiB" in status.reason
    total = torch.cuda.mem_get_info(device)[1] / 2**30
    assert f"total capacity of {total:.2f} GiB of which " in status.reason
    assert " is free" in status.reason
    # The GPU is as good as before to the next run of the process.
    train(Run(study, "b"), CONFIG, device)
    assert len(val_losses(Run(study, "b"))) == CONFIG.epochs


def peak_bytes(device: torch.device, run: Run, leave_at: tuple[int, ...]) -> int:
    """What an attempt takes beside what is there, at most."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    config = replace(CONFIG, width=2048, cuda_graph=False)
    with suppress(RunInterrupted):
        train(run, config, device, leave_at)
    return torch.cuda.max_memory_allocated(device) - before


def test_a_run_that_resumes_takes_no_more_memory_than_at_its_start(
    study: Path, device: torch.device
) -> None:
    run = Run(study, "a")
    train(Run(study, "first"), replace(CONFIG, epochs=1), device)  # cuBLAS takes its own for good
    start = peak_bytes(device, run, (2,))
    resumed = peak_bytes(device, run, (4,))
    assert [attempt.last_step for attempt in run.status().attempts] == [2, 4]
    # Weights, their average, two moments; and gradients.
    assert start > 5 * bytes_of(read_checkpoint(run.last)["model_state_dict"])
    assert resumed <= 1.05 * start
