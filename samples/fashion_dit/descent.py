"""What trainings have in common: optimizer, learning rate, one step, the moving average."""

from __future__ import annotations

import torch
from torch import nn


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over all parameters; `descend` sets the learning rate of every step."""
    return torch.optim.AdamW(
        model.parameters(), weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
    )


def falling_rate(
    learning_rate: float, step: int, *, steps: int, warmup: int, decay_share: float
) -> float:
    """Learning rate at a step: linear warm-up, constant, linear decay to zero."""
    decay_from = steps * (1.0 - decay_share)
    left = (steps - step) / max(steps - decay_from, 1.0)
    return learning_rate * min(1.0, (step + 1) / warmup, left)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step along the gradients that are there, clipped to norm 1; they are dropped after it."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def update_average(average: nn.Module, model: nn.Module, ema_decay: float, step: int) -> None:
    """Move the average towards the model after a step, numbered from 0."""
    # A short memory early on keeps the first, random weights out of the average.
    decay = min(ema_decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(
        list(average.parameters()), [value.detach() for value in model.parameters()], 1.0 - decay
    )
