"""From a recording to the statistics that factors are made from; streaming, step by step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import ObserveError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.factors.statistics import Statistics
from calicache.graph_passes.factors.streams import Channels, KeptValues, Moments, stream_of
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.tap import Tap
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.settings.choices import StepMode, Weighting
from calicache.graph_passes.sites.targets import CalibrationTarget


def observe(
    captured: CapturedGraph,
    targets: Sequence[CalibrationTarget],
    recording: Recording,
    weighting: Weighting,
    schedule: Sequence[StepMode],
    order: int = 0,
    meter: Meter | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Statistics]:
    """Run the recorded calls through the graph and collect statistics, by target name.

    `activation` averages over all steps; `increment` over the differences between neighbouring
    steps of one run, as in the paper. `covariance`, and every residual branch calibrated as a
    whole, take the increments against the anchors that the plan will use: on its CALIBRATE
    steps, with its lags and its order. `none` needs nothing. Steps that nothing looks at are
    not run.

    Args:
        captured: the graph of the recorded model.
        targets: where to look; those of rank 0 need nothing.
        recording: calls of the same form as the graph's.
        weighting: what the statistics are for.
        schedule: mode of every step.
        order: of the anchors.
        meter: counts the steps of every run that this process looks at.
        ranks: the processes that share the runs.

    Raises:
        ObserveError: a value is NaN or Inf, or no run has the increments that are needed.
    """
    kept = KeptValues(schedule, order)
    seen = [target for target in targets if _needs_statistics(target, weighting)]
    streams = {target.name: stream_of(target, weighting, kept) for target in seen}
    watched = {node for target in seen for node in (target.input_node, *target.nodes)}
    runs = [run[: len(schedule)] for run in recording.runs] if streams else []
    earlier = [0, *accumulate(len(run) for run in runs)]
    feed = partial(_feed_run, captured, list(streams.values()), watched, kept, meter)
    ranks.map(feed, list(zip(runs, earlier, strict=False)))
    for stream in streams.values():
        stream.sum_over(ranks)
    return {name: streams.pop(name).result() for name in list(streams)}


def _needs_statistics(target: CalibrationTarget, weighting: Weighting) -> bool:
    is_branch = not target.weights
    return bool(target.rank) and (is_branch or weighting is not Weighting.NONE)


def _feed_run(
    captured: CapturedGraph,
    streams: Sequence[Channels | Moments],
    watched: Collection[str],
    kept: KeptValues,
    meter: Meter | None,
    place: tuple[Run, int],
) -> None:
    """Run the recorded calls of a run, as far as streams look at them.

    Args:
        captured: the graph.
        streams: for the values of its nodes.
        watched: nodes whose values have to be finite, with those that the streams look at.
        kept: what the streams keep of a run.
        meter: counts the steps.
        place: the run, as long as the schedule at the most, and how many steps were recorded in
            the runs before it, for errors.
    """
    run, earlier = place
    kept.start()
    for stream in streams:
        stream.start()
    for step, call in enumerate(run):
        listeners = [stream for stream in streams if stream.looks_at(step)]
        if listeners:
            tap = Tap(captured.module, watched, _Feed(listeners, step, earlier + step).tell)
            with torch.no_grad():
                tap.run(*(value.to(captured.device) for value in call.values()))
        if meter:
            meter.add()


class _Feed:
    """Feeds the streams from one step, each as soon as it has all its values."""

    def __init__(self, streams: Sequence[Channels | Moments], step: int, done: int) -> None:
        self.step, self.done = step, done
        self.missing = [(stream, set(stream.nodes)) for stream in streams]
        self.values: dict[str, Tensor] = {}

    def tell(self, node: str, value: Tensor) -> None:
        """Take the value of a node."""
        _check_finite(node, value, self.done)
        self.values[node] = value
        for stream, names in self.missing:
            names.discard(node)
            if not names:
                stream.add(self.step, self.values)
        self.missing = [entry for entry in self.missing if entry[1]]
        waited = {name for stream, _ in self.missing for name in stream.nodes}
        self.values = {name: value for name, value in self.values.items() if name in waited}


def _check_finite(node: str, value: Tensor, step: int) -> None:
    # A sum is NaN or Inf where a term is, and far cheaper than a look at every term.
    suspect = not bool(torch.isfinite(value.sum(dtype=torch.float32)))
    if suspect and not bool(torch.isfinite(value).all()):
        raise ObserveError(
            f"node {node}, recorded step {step}",
            expected="finite activations",
            got="NaN or Inf",
            fix="Check the model's weights and dtype, and the recorded inputs.",
        )
