"""The trainer's clipping, which the fused optimizer does, is clipping before its step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowjobs.config import TrainingConfig
from flowjobs.training import FlowTrainer
from tests.training.test_trainer import make_trainer


class Scaled(nn.Module):
    """Its gradients become smaller by ten with each call."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64, dtype=dtype)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * 10.0 ** (2 - self.calls)


def clip_before(trainer: FlowTrainer, max_norm: float) -> list[float]:
    """Let a trainer clip as a loop of one's own would. Gives the norms that it clips."""
    optimizer, weights = trainer.state.optimizer, list(trainer.state.model.parameters())
    step, norms = optimizer.step, []

    def clipped() -> None:
        del optimizer.grad_scale
        norms.append(float(nn.utils.clip_grad_norm_(weights, max_norm)))
        step()

    clipped._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or the scheduler warns
    optimizer.step = clipped  # type: ignore[method-assign]
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.3, 1.0, 5.0])
def test_the_trainer_clips_like_clip_grad_norm(
    study: Path, max_norm: float, dtype: torch.dtype
) -> None:
    config = TrainingConfig(grad_clip=max_norm, warmup_steps=0)
    fused, plain = (make_trainer(study, config, model=Scaled(dtype)) for _ in range(2))
    norms = clip_before(plain, max_norm)
    for trainer in (fused, plain):
        for _ in range(4):
            trainer._step()
    assert max(norms) > max_norm > min(norms), "one step is clipped, another is not"
    for ours, theirs in zip(
        fused.state.optimizer.state_dict()["state"].values(),
        plain.state.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        # The moments: AdamW's step itself hardly depends on how large the gradients are.
        for key in ("exp_avg", "exp_avg_sq"):
            rounding = 1e-6 * float(theirs[key].abs().max())
            assert torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=rounding)
    for ours, theirs in zip(
        fused.state.model.parameters(), plain.state.model.parameters(), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
