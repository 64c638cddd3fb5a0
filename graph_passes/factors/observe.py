"""From a recording to the statistics that factors are made from; streaming, step by step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.common.errors import ObserveError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.factors.statistics import Statistics
from calicache.graph_passes.factors.streams import Channels, KeptValues, Moments, stream_of
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.recording import Recording
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
        meter: counts the steps of every run.

    Raises:
        ObserveError: a value is NaN or Inf, or no run has the increments that are needed.
    """
    kept = KeptValues(schedule, order)
    streams = {
        target.name: stream_of(target, weighting, kept)
        for target in targets
        if target.rank and (weighting is not Weighting.NONE or not target.weights)
    }
    if not streams:
        return {}
    watched = {
        node
        for target in targets
        if target.name in streams
        for node in (target.input_node, *target.nodes)
    }
    done = 0
    for run in recording.runs:
        kept.start()
        for stream in streams.values():
            stream.start()
        for step, call in enumerate(run[: len(schedule)]):
            listeners = [stream for stream in streams.values() if stream.looks_at(step)]
            if listeners:
                tap = _Tap(captured.module, watched, listeners, step, done)
                with torch.no_grad():
                    tap.run(*(value.to(captured.device) for value in call.values()))
            done += 1
            if meter:
                meter.add()
    return {name: streams.pop(name).result() for name in list(streams)}


class _Tap(fx.Interpreter):
    """Runs the graph and feeds the streams, each as soon as it has all its values."""

    def __init__(
        self,
        module: fx.GraphModule,
        watched: Collection[str],
        streams: Sequence[Channels | Moments],
        step: int,
        done: int,
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False  # errors are told in our own words
        self.watched, self.step, self.done = watched, step, done
        self.missing = [(stream, set(stream.nodes)) for stream in streams]
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.watched:
            _check_finite(n.name, value, self.done)
            self.values[n.name] = value
            self._feed(n.name)
        return value

    def _feed(self, node: str) -> None:
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
