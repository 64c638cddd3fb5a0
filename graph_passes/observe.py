"""Recorded trajectories to the statistics that a weighting needs; streaming, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.capture import CapturedGraph
from calicache.graph_passes.decompose import ChannelStatistics, Weighting
from calicache.graph_passes.errors import ObserveError
from calicache.graph_passes.record import Trajectory
from calicache.graph_passes.sites import Sites

EPSILON = 1e-6


def observe(
    captured: CapturedGraph,
    sites: Sites,
    trajectory: Trajectory,
    weighting: Weighting,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, ChannelStatistics]:
    """Run the recorded calls through the graph and collect statistics, by site name.

    `activation` averages over all steps; `increment` over the differences between
    neighbouring steps of one run. `none` needs nothing and runs nothing.

    Args:
        captured: the graph of the recorded model.
        sites: where to look.
        trajectory: calls of the same form as the graph's.
        weighting: what the statistics are for.
        on_step: called as on_step(done, total), for a progress bar.

    Raises:
        ObserveError: a value is NaN or Inf, or no run has two steps.
    """
    if weighting is Weighting.NONE:
        return {}
    tapped = {name for site in sites.linears for name in (site.input_node, site.node)}
    sums = {name: _NormalisedMean() for name in tapped}
    device = next((p.device for p in captured.module.parameters()), torch.device("cpu"))
    total = sum(len(run) for run in trajectory.runs)
    done = 0
    for run in trajectory.runs:
        before: dict[str, Tensor] = {}
        for call in run:
            values = _tap(captured, tapped, [v.to(device) for v in call.values()])
            _check_finite(values, done)
            for name, value in values.items():
                if weighting is Weighting.ACTIVATION:
                    sums[name].add(value)
                elif name in before:
                    sums[name].add(value.double() - before[name].double())
            before = values
            done += 1
            if on_step:
                on_step(done, total)
    return {
        site.name: ChannelStatistics(sums[site.input_node].mean(), sums[site.node].mean())
        for site in sites.linears
    }


class _NormalisedMean:
    """Running mean over samples of a channel magnitude, min-max normalised in each sample."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, value: Tensor) -> None:
        """Add the samples of a value (B, ..., C)."""
        magnitude = value.double().abs().flatten(1, -2).mean(dim=1)  # (B, C)
        low = magnitude.amin(dim=1, keepdim=True)
        high = magnitude.amax(dim=1, keepdim=True)
        normalised = ((magnitude - low) / (high - low + EPSILON)).sum(dim=0)  # (C,)
        self.total = normalised if self.total is None else self.total + normalised
        self.samples += value.shape[0]

    def mean(self) -> Tensor:
        """float32 (C,) on the CPU."""
        if self.total is None:
            raise ObserveError(
                "trajectory",
                expected="a run of at least 2 steps",
                got="no increment",
                fix="Record a whole sampler run.",
            )
        return (self.total / self.samples).float().cpu()


class _Tap(fx.Interpreter):
    """Runs the graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, tapped: set[str]) -> None:
        super().__init__(module)
        self.tapped, self.values = tapped, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.tapped:
            self.values[n.name] = value
        return value


def _tap(captured: CapturedGraph, tapped: set[str], tensors: list[Tensor]) -> dict[str, Tensor]:
    tap = _Tap(captured.module, tapped)
    with torch.no_grad():
        tap.run(*tensors)
    return tap.values


def _check_finite(values: Mapping[str, Tensor], step: int) -> None:
    for name, value in values.items():  # in graph order: the first bad one is the cause
        if not bool(torch.isfinite(value).all()):
            raise ObserveError(
                f"node {name}, recorded step {step}",
                expected="finite activations",
                got="NaN or Inf",
                fix="Check the model's weights and dtype, and the recorded inputs.",
            )
