"""Small models under plans, and their graphs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from model import FashionDiT, FashionDiTConfig
from support.models import sample_dit, shake
from torch import Tensor, nn

from calicache.graph_passes import (
    ModelGraphs,
    OptimizedModel,
    Plan,
    StepMode,
    optimize,
    record,
    view_graphs,
)
from calicache.graph_passes.describe.graphs import NodeView

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode
MODES = {"plain": None, **{mode.name.lower(): mode for mode in StepMode}}
SCHEDULE = (REFRESH, CALIBRATE, REUSE, REFRESH, FORECAST)


@functools.cache
def small_model(order: int) -> OptimizedModel:
    """Two blocks of width 8; anchors of an order."""
    torch.manual_seed(0)
    model = FashionDiT(FashionDiTConfig(width=8, depth=2, heads=2, frequency_channels=8))
    with record(shake(model)) as recording:
        sample_dit(model, batch=1, steps=len(SCHEDULE))
    plan = Plan.from_trajectory(
        model, recording, schedule=SCHEDULE, rank=2, order=order, correct=False
    )
    return optimize(model, plan)


@functools.cache
def small_graphs(order: int) -> ModelGraphs:
    """The graphs of `small_model`."""
    optimized = small_model(order)
    return view_graphs(optimized.compiled.captured, optimized.compiled.variant_set)


class Mix(nn.Module):
    """x + f(x), read as it comes: no norm before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Stack(nn.Module):
    """Blocks that run `times` times, with something of the model's own in between."""

    def __init__(self, times: int = 1, *, between: bool = False, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mix() for _ in range(depth))
        self.times, self.between = times, between

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            for layer in self.layers:
                x = layer(x)
                x = x.tanh() if self.between else x
        return x


class Skips(nn.Module):
    """Blocks on the way down and up, one between them, and skip connections from side to side."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Mix() for _ in range(2))
        self.mid = Mix()
        self.up = nn.ModuleList(Mix() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = layer(x)
            kept.append(x)
        x = self.mid(x)
        for layer in self.up:
            x = layer(x + kept.pop())
        return x


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Mix() for _ in range(2))
        self.second = nn.ModuleList(Mix() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.first, *self.second):
            x = layer(x)
        return x


def compiled(model: nn.Module, *shape: int, schedule: str = "RCC") -> OptimizedModel:
    letters = dict(zip("RCUF", StepMode, strict=True))
    with record(shake(model)) as recording:
        for step in range(len(schedule)):
            torch.manual_seed(step)
            model(torch.randn(*shape))
    modes = [letters[letter] for letter in schedule]
    plan = Plan.from_trajectory(model, recording, schedule=modes, rank=2, order=0, correct=False)
    return optimize(model, plan)


def named(nodes: Sequence[NodeView]) -> dict[str, NodeView]:
    return {node.name: node for node in nodes}
