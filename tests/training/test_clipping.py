"""Clipping inside the fused optimizer is clipping before it."""

import torch
from torch import nn


def test_grad_scale_of_the_fused_optimizer_clips_like_clip_grad_norm() -> None:
    weights = []
    for fused_clip in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0, fused=True)
        for step in range(4):
            optimizer.zero_grad()
            # Gradients above and below the limit; a large eps lets their size through Adam.
            (model(torch.ones(4, 8)).sum() * 10.0 ** (1 - step)).backward()
            if fused_clip:
                norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
                optimizer.grad_scale = norm.clamp(min=1.0)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        weights.append(model.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], rtol=1e-5, atol=1e-7)
