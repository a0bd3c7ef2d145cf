"""Two ranks on one GPU: refused in words where NCCL would, and as exact as one through gloo."""

from pathlib import Path

import pytest

from flowjobs.runs.run import Run
from tests.gpu import rank_job
from tests.gpu.runs import STEPS, assert_interrupted, assert_same_bits
from tests.training.test_leaving import end, free_port, start

pytestmark = pytest.mark.gpu


def test_two_ranks_on_one_gpu_are_refused_and_with_gloo_resume_to_the_bit(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ports = free_port(), free_port()
    ranks = [start(rank_job.__file__, study, rank, *ports) for rank in range(2)]
    for said in end(ranks, 0):
        assert "ranks 0 and 1 have one GPU between them, expected one each" in said
        assert "not refused" not in said
        assert "captured False" in said  # a graph is of one rank alone
    whole, parts = Run(study, "whole"), Run(study, "parts")
    assert whole.status().attempts[-1].last_step == STEPS
    assert_interrupted(parts, 2)
    assert_same_bits(whole, parts)
