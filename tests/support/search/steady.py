"""A clock that always runs alike, for tests of what is done with measured seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from calicache.graph_passes import OptimizedModel, StepMode
from calicache.graph_passes.api.speed import eager, planning
from calicache.graph_passes.api.speed.runs import RunTimes, time_runs

PLAIN, FORECAST = 1.0, 0.01


def by_macs(model: nn.Module, call: dict[str, Any]) -> float:
    """Seconds of a call that follow the multiply-accumulates, a plain one taking 1."""
    with torch.no_grad():
        model(**call)
    if not isinstance(model, OptimizedModel):
        return PLAIN
    mode = model.plan.schedule[int(model.state.calls[-1].place)]
    if mode is StepMode.FORECAST:
        return FORECAST
    if model.plan.schedule[-1] is StepMode.FORECAST:
        return PLAIN  # and no graph is made
    cost = model.compiled.cost
    return 0.05 + 0.95 * cost.modes[mode] / cost.plain_macs


def steady(patch: pytest.MonkeyPatch, speedup: float = 2.0) -> None:
    """Probes follow the MACs, and whole runs are so many times as fast."""

    def timed(*args: Any) -> RunTimes:
        return replace(time_runs(*args), plain=speedup, fast=1.0)

    patch.setattr(eager, "seconds_of", by_macs)
    patch.setattr(planning, "time_runs", timed)


@contextmanager
def counting(models: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """The names of the models that are called, call by call."""
    seen: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: seen.append(name)

    handles = [model.register_forward_pre_hook(note(name)) for name, model in models.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
