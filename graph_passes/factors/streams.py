"""What is streamed of recorded values, step by step: the statistics that factors are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import ObserveError
from calicache.graph_passes.common.ranks import Ranks
from calicache.graph_passes.factors.statistics import (
    ChannelStatistics,
    SecondMoments,
    statistics_shapes,
)
from calicache.graph_passes.settings.choices import Granularity, StepMode, Weighting
from calicache.graph_passes.settings.schedule import anchor_table, kept_refreshes
from calicache.graph_passes.sites.targets import CalibrationTarget

EPSILON = 1e-6


class KeptValues:
    """Values of the newest refreshes by node, one copy for all targets that look at a node."""

    def __init__(self, schedule: Sequence[StepMode], order: int) -> None:
        self.schedule, self.order = schedule, order
        self.weights = anchor_table(schedule, order)
        self.values: dict[str, dict[int, Tensor]] = {}

    def start(self) -> None:
        """A new run begins: no refresh is kept."""
        self.values = {}

    def keep(self, step: int, node: str, value: Tensor) -> None:
        """Keep a value of a REFRESH step, and forget what no step after it needs."""
        recent = (step, *kept_refreshes(self.schedule, step, self.order))
        values = {**self.values.get(node, {}), step: value}
        self.values[node] = {k: values[k] for k in recent if k in values}

    def increment(self, step: int, node: str, value: Tensor) -> Tensor:
        """Give a value less its anchor, float32 rows (T, C)."""
        increment = value.float()
        kept = kept_refreshes(self.schedule, step, self.order + 1)
        for weight, place in zip(self.weights[step], kept, strict=False):
            increment = increment - weight * self.values[node][place].float()
        return increment.flatten(0, -2)


class Channels:
    """Streams the paper's channel statistics of one site.

    Attributes:
        nodes: whose values it looks at.
    """

    def __init__(self, target: CalibrationTarget, *, increments: bool) -> None:
        self.nodes = (target.input_node, *target.nodes)
        self.increments = increments
        self.input, self.output = _NormalisedMean(), _NormalisedMean()
        self.before: tuple[Tensor, Tensor] | None = None

    def start(self) -> None:
        """A new run begins: nothing to subtract yet."""
        self.before = None

    def looks_at(self, step: int) -> bool:  # noqa: ARG002
        """Whether it needs the values of a step."""
        return True

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Add the values of a step."""
        x, y = (values[node] for node in self.nodes)
        if not self.increments:
            self.input.add(x)
            self.output.add(y)
        elif self.before is not None:
            self.input.add(x.double() - self.before[0].double())
            self.output.add(y.double() - self.before[1].double())
        self.before = (x, y)

    def sum_over(self, ranks: Ranks) -> None:
        """Add what the other processes have seen."""
        for mean in (self.input, self.output):
            mean.sum_over(ranks)

    def result(self) -> ChannelStatistics:
        """Both means."""
        return ChannelStatistics(self.input.mean(), self.output.mean())


class Moments:
    """Streams second moments of the increments against the plan's anchors.

    Attributes:
        parts: names of the moments that the target needs, see `statistics_shapes`.
        nodes: whose values it looks at.
    """

    def __init__(self, target: CalibrationTarget, kept: KeptValues) -> None:
        self.kept = kept
        self.shapes = statistics_shapes(Weighting.COVARIANCE, target)
        self.parts = tuple(self.shapes)
        self.inputs = (target.input_node,) * ("input" in self.parts)
        self.outputs = target.nodes * ("output" in self.parts or "cross" in self.parts)
        self.nodes = (*self.inputs, *self.outputs)
        self.sums: dict[str, Tensor] = {}
        self.energy = 0.0
        self.rows = 0

    def start(self) -> None:
        """A new run begins; what is kept of the one before is forgotten elsewhere."""

    def looks_at(self, step: int) -> bool:
        """Whether it needs the values of a step."""
        return self.kept.schedule[step] in (StepMode.REFRESH, StepMode.CALIBRATE)

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keep the values of a REFRESH step, add the increments of a CALIBRATE step."""
        if self.kept.schedule[step] is StepMode.REFRESH:
            for node in self.nodes:
                self.kept.keep(step, node, values[node])
            return
        dx = [self.kept.increment(step, node, values[node]) for node in self.inputs]
        dy = [self.kept.increment(step, node, values[node]) for node in self.outputs]
        sides = {"input": (dx, dx), "output": (dy, dy), "cross": (dx, dy)}
        for part in self.parts:
            if part == "energy":
                self.energy += sum(float(y.square().sum(dtype=torch.float64)) for y in dy)
            else:
                left, right = sides[part]
                self._accumulate(part, _stacked(left), _stacked(right))
        self.rows += len((*dx, *dy)[0])

    def sum_over(self, ranks: Ranks) -> None:
        """Add what the other processes have seen."""
        if ranks.size == 1:
            return
        for part in self.parts:
            if part != "energy":
                own = self.sums.pop(part, torch.zeros(self.shapes[part], dtype=torch.float64))
                self.sums[part] = ranks.add(own)
        counts = ranks.gather((self.energy, self.rows))
        self.energy = sum(energy for energy, _ in counts)
        self.rows = sum(rows for _, rows in counts)

    def result(self) -> SecondMoments:
        """Means over tokens, float32 on the CPU; the sums become them."""
        if not self.rows:
            raise no_increment("a run with a CALIBRATE step after a REFRESH step")
        means = {n: value.div_(self.rows).float().cpu() for n, value in self.sums.items()}
        if "energy" in self.parts:
            means["energy"] = torch.tensor(self.energy / self.rows)
        return SecondMoments(**means)

    def _accumulate(self, part: str, left: Tensor, right: Tensor) -> None:
        # One step in float32, the sum in float64: the same to 1e-12 however runs are shared out.
        step = left.T @ right
        if part in self.sums:
            self.sums[part].add_(step)
        else:
            self.sums[part] = step.double()


def _stacked(increments: Sequence[Tensor]) -> Tensor:
    """Channels of several values side by side, (T, sum of C)."""
    return increments[0] if len(increments) == 1 else torch.cat(list(increments), dim=-1)


def stream_of(
    target: CalibrationTarget, weighting: Weighting, kept: KeptValues
) -> Channels | Moments:
    """What a target needs for a weighting."""
    if target.granularity is Granularity.BRANCH or weighting is Weighting.COVARIANCE:
        return Moments(target, kept)
    return Channels(target, increments=weighting is Weighting.INCREMENT)


class _NormalisedMean:
    """Running mean over samples of a channel magnitude, min-max normalised in each sample."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, value: Tensor) -> None:
        """Add the samples of a value (B, ..., C); without tokens, (B, C), each is one token."""
        magnitude = value.double().abs()
        if value.ndim > 2:
            magnitude = magnitude.flatten(1, -2).mean(dim=1)  # (B, C)
        low = magnitude.amin(dim=1, keepdim=True)
        high = magnitude.amax(dim=1, keepdim=True)
        normalised = ((magnitude - low) / (high - low + EPSILON)).sum(dim=0)  # (C,)
        self.total = normalised if self.total is None else self.total + normalised
        self.samples += value.shape[0]

    def sum_over(self, ranks: Ranks) -> None:
        """Add what the other processes have seen."""
        seen = [pair for pair in ranks.gather((self.total, self.samples)) if pair[1]]
        self.samples = sum(samples for _, samples in seen)
        if ranks.size > 1 and seen:
            self.total = torch.stack([total.cpu() for total, _ in seen if total is not None]).sum(0)

    def mean(self) -> Tensor:
        """float32 (C,) on the CPU."""
        if self.total is None:
            raise no_increment("a run of at least 2 steps")
        return (self.total / self.samples).float().cpu()


def no_increment(expected: str) -> ObserveError:
    """A recording in which nothing could be subtracted."""
    return ObserveError(
        "recording",
        expected=expected,
        got="no increment",
        fix="Record a whole sampler run.",
    )
