"""A small model with its sampler, and a clock that runs alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.search.steady import steady
from support.small.subjects import STEPS, small_model
from torch import Tensor, nn

Sample = Callable[[nn.Module], Tensor]


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return small_model()


@pytest.fixture(scope="session")
def sample() -> Sample:
    """Euler's method from noise that torch draws."""

    def euler(model: nn.Module) -> Tensor:
        x = torch.randn(2, 5, 4)
        for step in range(STEPS):
            x = x - 0.1 * model(x, torch.full((2,), 1 - step / STEPS))
        return x

    return euler


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
