"""A model that only calibration can follow, recorded runs of it, and plans compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calicache.graph_passes import Plan, Recording, record
from calicache.graph_passes.common.errors import PlanError

STEPS, TOKENS, WIDTH, BATCH = 8, 4, 64, 2
SEEDS = (0, 1, 2)


class Branch(nn.Module):
    """A residual branch whose value changes beyond any forecast from step to step.

    What goes into its layers changes slowly or keeps to few directions, so that CALIBRATE steps
    of that rank can follow.
    """

    def __init__(self, width: int, rank: int, pace: float) -> None:
        super().__init__()
        self.up, self.down, self.pace = nn.Linear(width, width), nn.Linear(width, width), pace
        with torch.no_grad():
            for layer in (self.up, self.down):
                product = torch.randn(width, rank) @ torch.randn(rank, width)
                layer.weight.copy_(1.5 * product / (rank * width) ** 0.5)
        self.phase = nn.Parameter(6 * torch.rand(width))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        flicker = torch.sin(timestep[:, None, None] * self.pace + self.phase)
        return self.down(torch.tanh(self.up(x)) * flicker)


class Flicker(nn.Module):
    """Two such branches."""

    def __init__(self, width: int = WIDTH, rank: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Branch(width, rank, pace) for pace in (1700, 2900))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x, timestep)
        return x


Times = Sequence[float]


def evenly(steps: int) -> list[float]:
    return [1 - k / steps for k in range(steps)]


TIMES = evenly(STEPS)


def euler(
    model: nn.Module, seed: int, times: Times = TIMES, batch: int = BATCH, noise: float = 0
) -> Tensor:
    """The user's own sampler."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, TOKENS, next(model.parameters()).shape[-1], generator=draw)
    with torch.no_grad():
        for now, after in zip(times, [*times[1:], 0.0], strict=True):
            x = x - (now - after) * model(x, torch.full((batch,), now))
            x = x + noise * torch.randn(x.shape, generator=draw)
    return x


def sample_errors(got: Tensor, full: Tensor) -> list[float]:
    """Relative L2 error of every sample."""
    errors: list[float] = (
        (got - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
    ).tolist()
    return errors


def record_runs(model: nn.Module, seeds: Sequence[int] = SEEDS, **options: Any) -> Recording:
    with record(model) as recording:
        for seed in seeds:
            recording.finish(euler(model, seed, **options))
    return recording


@cache
def flicker() -> tuple[Flicker, Recording]:
    model = Flicker().eval()
    return model, record_runs(model)


def each(recording: Recording, places: Sequence[int] = (0, 1, 2), times: int = 5) -> Recording:
    """Every run several times: a max_error wants samples to choose with."""
    return recording.take_runs([place for place in places for _ in range(times)])


@contextmanager
def refuses(where: str, *parts: str) -> Iterator[None]:
    """A plan error of that place, with these words in what was expected and got."""
    with pytest.raises(PlanError) as caught:
        yield
    error = caught.value
    said = f"expected {error.expected}, got {error.got}."
    assert error.where == where
    assert [part for part in parts if part not in said] == []
    assert error.fix


def assert_same_plan(one: Plan, other: Plan, *, held_out: bool = True) -> None:
    """Equal in every choice, and in every number but for float32 sums in another order."""
    assert one.front is not None
    assert other.front is not None
    assert one.front.choice == other.front.choice
    assert len(one.front.points) == len(other.front.points)
    for mine, its in zip(one.front.points, other.front.points, strict=True):
        assert (mine.schedule, mine.order, mine.rules, mine.ranks, mine.cost) == (
            *(its.schedule, its.order, its.rules, its.ranks, its.cost),
        )
        weights = [torch.tensor(point.output_weights) for point in (mine, its)]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
        assert mine.error.mean == pytest.approx(its.error.mean, rel=1e-2, abs=1e-6)
    assert one.recipe.latent == other.recipe.latent
    recipes = [replace(plan.recipe, output_weights=None, latent=None) for plan in (one, other)]
    assert recipes[0] == recipes[1]
    # How far latents move is seen in all runs: it tells runs apart, and decides nothing else.
    grid, same = one.binding.grid, {"reads": "[]", "run_values": {}}
    bindings = [replace(plan.binding, grid=grid, **same) for plan in (one, other)]
    assert bindings[0] == bindings[1]
    assert set(one.statistics) == set(other.statistics)
    if held_out:
        assert one.front.held_out is not None
        assert other.front.held_out is not None
        means = [front.held_out.mean for front in (one.front, other.front) if front.held_out]
        assert means[0] == pytest.approx(means[1], rel=1e-2, abs=1e-6)
