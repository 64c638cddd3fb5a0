"""Evaluations small enough for a test; `calicache evaluate` reads them from this file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from support.small.subjects import STEPS, small_model
from torch import Tensor, nn

from calicache.tools.evaluate.subject import EvaluationModel

PAUSE = "SECONDS_A_BATCH"  # in the environment: so that a test can kill a process at work
SIZE = (5, 4, 1)


class Scores(nn.Module):
    """Numbers (N, width) from images uint8 (N, 1, 5, 4)."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.layer = nn.Linear(20, width, bias=False)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.layer.weight.normal_(generator=draw)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.layer(images.flatten(1).float() / 128 - 1))


def sample(denoiser: nn.Module, seeds: Sequence[int]) -> Tensor:
    """Euler's method, as the plan of `small_folder` was recorded with."""
    time.sleep(float(os.environ.get(PAUSE, 0)))
    x = torch.stack(
        [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    for step in range(STEPS):
        x = x - 0.1 * denoiser(x, torch.full((len(x),), 1 - step / STEPS))
    return ((x.clamp(-2, 2) + 2) * 63.75).round().byte().unsqueeze(3)


def small() -> EvaluationModel:
    return EvaluationModel(
        "small",
        small_model(),
        sample,
        features=Scores(6, seed=1).eval(),
        logits=Scores(3, seed=2).eval(),
        settings={"steps": STEPS, "scale": 0.1},
    )


def other_steps() -> EvaluationModel:
    return replace(small(), settings={"steps": STEPS, "scale": 0.2})


def in_training() -> EvaluationModel:
    return replace(small(), features=Scores(6, seed=1))
