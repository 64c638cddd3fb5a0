"""Recorded trajectories to the statistics that factors are made from; streaming, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.assign import CalibrationTarget, Granularity
from calicache.graph_passes.capture import CapturedGraph
from calicache.graph_passes.covariance import SecondMoments
from calicache.graph_passes.decompose import ChannelStatistics, Weighting
from calicache.graph_passes.errors import ObserveError
from calicache.graph_passes.factors import Statistics
from calicache.graph_passes.record import Trajectory
from calicache.graph_passes.schedule import StepMode, anchor_table, kept_refreshes

EPSILON = 1e-6


def observe(
    captured: CapturedGraph,
    targets: Sequence[CalibrationTarget],
    trajectory: Trajectory,
    weighting: Weighting,
    schedule: Sequence[StepMode],
    order: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Statistics]:
    """Run the recorded calls through the graph and collect statistics, by target name.

    `activation` averages over all steps; `increment` over the differences between neighbouring
    steps of one run, as in the paper. `covariance`, and every residual branch calibrated as a
    whole, take the increments against the anchors that the plan will use: on its CALIBRATE
    steps, with its lags and its order. `none` needs nothing.

    Args:
        captured: the graph of the recorded model.
        targets: where to look; those of rank 0 need nothing.
        trajectory: calls of the same form as the graph's.
        weighting: what the statistics are for.
        schedule: mode of every step.
        order: of the anchors.
        on_step: called as on_step(done, total), for a progress bar.

    Raises:
        ObserveError: a value is NaN or Inf, or no run has the increments that are needed.
    """
    streams = {
        target.name: _stream(target, weighting, schedule, order)
        for target in targets
        if target.rank and (weighting is not Weighting.NONE or not target.weights)
    }
    if not streams:
        return {}
    observed = [target for target in targets if target.name in streams]
    tapped = {node for target in observed for node in (target.input_node, *target.nodes)}
    total = sum(min(len(run), len(schedule)) for run in trajectory.runs)
    done = 0
    for run in trajectory.runs:
        for stream in streams.values():
            stream.start()
        for step, call in enumerate(run[: len(schedule)]):
            values = _tap(captured, tapped, [v.to(captured.device) for v in call.values()])
            _check_finite(values, done)
            for target in observed:
                ys = [values[node] for node in target.nodes]
                streams[target.name].add(step, values[target.input_node], ys)
            done += 1
            if on_step:
                on_step(done, total)
    return {name: stream.result() for name, stream in streams.items()}


class _Channels:
    """Streams the paper's channel statistics of one site."""

    def __init__(self, *, increments: bool) -> None:
        self.increments = increments
        self.input, self.output = _NormalisedMean(), _NormalisedMean()
        self.before: tuple[Tensor, Tensor] | None = None

    def start(self) -> None:
        """A new run begins: nothing to subtract yet."""
        self.before = None

    def add(self, step: int, x: Tensor, ys: Sequence[Tensor]) -> None:  # noqa: ARG002
        (y,) = ys
        if not self.increments:
            self.input.add(x)
            self.output.add(y)
        elif self.before is not None:
            self.input.add(x.double() - self.before[0].double())
            self.output.add(y.double() - self.before[1].double())
        self.before = (x, y)

    def result(self) -> ChannelStatistics:
        """Both means."""
        return ChannelStatistics(self.input.mean(), self.output.mean())


class _Moments:
    """Streams second moments of the increments against the plan's anchors."""

    def __init__(self, target: CalibrationTarget, schedule: Sequence[StepMode], order: int) -> None:
        self.schedule, self.weights = schedule, anchor_table(schedule, order)
        self.whole = target.granularity is Granularity.BRANCH
        self.by_output = not self.whole and sum(target.out_features) < target.in_features
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def start(self) -> None:
        """A new run begins: no refresh is kept."""
        self.kept = {}

    def add(self, step: int, x: Tensor, ys: Sequence[Tensor]) -> None:
        """Keep the values of a REFRESH step, add the increments of a CALIBRATE step."""
        order = len(self.weights[0]) - 1
        y = torch.cat(list(ys), dim=-1) if self.whole or self.by_output else x
        if self.schedule[step] is StepMode.REFRESH:
            self.kept[step] = (x, y)
            recent = (step, *kept_refreshes(self.schedule, step, order))
            self.kept = {k: self.kept[k] for k in recent if k in self.kept}
        elif self.schedule[step] is StepMode.CALIBRATE:
            kept = kept_refreshes(self.schedule, step, order + 1)
            if self.by_output:
                dy = self._increment(step, kept, y, 1)
                self._accumulate("output", dy.T @ dy)
            else:
                dx = self._increment(step, kept, x, 0)
                self._accumulate("input", dx.T @ dx)
            if self.whole:
                dy = self._increment(step, kept, y, 1)
                self._accumulate("cross", dx.T @ dy)
                self._accumulate("energy", dy.square().sum())
            self.rows += x.shape[:-1].numel()

    def result(self) -> SecondMoments:
        """Means over tokens, float32 on the CPU."""
        if not self.rows:
            raise _no_increment("a run with a CALIBRATE step after a REFRESH step")
        return SecondMoments(**{n: (v / self.rows).float().cpu() for n, v in self.sums.items()})

    def _increment(self, step: int, kept: Sequence[int], value: Tensor, part: int) -> Tensor:
        increment = value.float()
        for weight, place in zip(self.weights[step], kept, strict=False):
            increment = increment - weight * self.kept[place][part].float()
        return increment.flatten(0, -2)  # (T, C)

    def _accumulate(self, name: str, product: Tensor) -> None:
        # One step in float32, the sum over steps in float64.
        self.sums[name] = self.sums[name] + product if name in self.sums else product.double()


def _stream(
    target: CalibrationTarget, weighting: Weighting, schedule: Sequence[StepMode], order: int
) -> _Channels | _Moments:
    if target.granularity is Granularity.BRANCH or weighting is Weighting.COVARIANCE:
        return _Moments(target, schedule, order)
    return _Channels(increments=weighting is Weighting.INCREMENT)


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
            raise _no_increment("a run of at least 2 steps")
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
        # A sum is NaN or Inf where a term is, and far cheaper than a look at every term.
        suspect = not bool(torch.isfinite(value.sum(dtype=torch.float32)))
        if suspect and not bool(torch.isfinite(value).all()):
            raise ObserveError(
                f"node {name}, recorded step {step}",
                expected="finite activations",
                got="NaN or Inf",
                fix="Check the model's weights and dtype, and the recorded inputs.",
            )


def _no_increment(expected: str) -> ObserveError:
    return ObserveError(
        "trajectory",
        expected=expected,
        got="no increment",
        fix="Record a whole sampler run.",
    )
