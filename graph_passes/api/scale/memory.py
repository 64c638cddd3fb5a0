"""Bytes that the stages of planning hold on the model's device, from shapes alone.

What is counted are tensors: the libraries, and what an allocator keeps beside them, are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, fx

from calicache.graph_passes.factors.factors import MOST_BYTES
from calicache.graph_passes.factors.statistics import statistics_shapes
from calicache.graph_passes.factors.streams import KeptValues, Moments, stream_of
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import VIEWS
from calicache.graph_passes.settings.choices import StepMode, Weighting
from calicache.graph_passes.sites.targets import CalibrationTarget

SUM_DTYPE = torch.float64  # of the second moments while they grow
FLOAT32, FLOAT64 = torch.float32.itemsize, torch.float64.itemsize
INCREMENTS = 3  # float32 copies of a value while its increment is made: value, product, result
MATRICES = 6  # float64 (n, n) of an eigendecomposition: matrix, copy, vectors, LAPACK's three


def live_bytes(graph: fx.Graph) -> int:
    """The most bytes of values that one run of a graph holds at once, weights left out.

    Views hold what they look at, and take nothing themselves.
    """
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(graph.nodes):
        source = node.args[0] if node.target in VIEWS else None
        owner[node] = owner[source] if isinstance(source, fx.Node) else node
        for user in (*node.all_input_nodes, node):
            last[owner[user]] = place
    ends: dict[int, list[fx.Node]] = {}
    for node, place in last.items():
        ends.setdefault(place, []).append(node)
    now = most = 0
    for place, node in enumerate(graph.nodes):
        if owner[node] is node:
            now += _value_bytes(node)
            most = max(most, now)
        now -= sum(map(_value_bytes, ends.get(place, ())))
    return most


def _value_bytes(node: fx.Node) -> int:
    if node.op in ("get_attr", "output"):
        return 0
    value = node.meta.get("val")
    return sum(v.nbytes for v in _leaves(value) if isinstance(v, Tensor))


def _leaves(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else (value,)


def node_bytes(captured: CapturedGraph, names: Sequence[str]) -> int:
    """Bytes of the values of some nodes, each counted once."""
    return sum(_value_bytes(captured.node(name)) for name in dict.fromkeys(names))


def looked_at(
    targets: Sequence[CalibrationTarget],
    weighting: Weighting,
    schedule: Sequence[StepMode],
    order: int,
) -> tuple[list[str], int]:
    """The nodes whose values observing keeps, and how often it keeps them."""
    kept = KeptValues(schedule, order)
    streams = [stream_of(target, weighting, kept) for target in targets]
    refreshes = order + 1 if any(isinstance(stream, Moments) for stream in streams) else 1
    return list(dict.fromkeys(name for stream in streams for name in stream.nodes)), refreshes


def moment_numbers(targets: Sequence[CalibrationTarget], weighting: Weighting) -> int:
    """Numbers of all statistics."""
    return sum(
        prod(shape) for target in targets for shape in statistics_shapes(weighting, target).values()
    )


def observing_bytes(
    captured: CapturedGraph,
    targets: Sequence[CalibrationTarget],
    weighting: Weighting,
    schedule: Sequence[StepMode],
    order: int,
) -> int:
    """Of observing, beside the weights: the graph's values, kept refreshes, sums, an increment."""
    names, refreshes = looked_at(targets, weighting, schedule, order)
    widest = max((t.tokens * (t.in_features + sum(t.out_features)) for t in targets), default=0)
    return (
        live_bytes(captured.graph)
        + refreshes * node_bytes(captured, names)
        + SUM_DTYPE.itemsize * moment_numbers(targets, weighting)
        + INCREMENTS * FLOAT32 * widest
    )


def decomposing_bytes(targets: Sequence[CalibrationTarget]) -> int:
    """Of decomposing one target after another: those that are held, and the largest being made."""
    largest = max((_decomposition_bytes(target) for target in targets), default=0)
    return held_bytes(targets) + largest


def held_bytes(targets: Sequence[CalibrationTarget]) -> int:
    """Of the decompositions that are held from then on."""
    return min(sum(_held_bytes(target) for target in targets), MOST_BYTES)


def factor_bytes(targets: Sequence[CalibrationTarget], itemsize: int) -> int:
    """Of the factors: A, B, and K, which lies where B does."""
    return itemsize * sum(t.rank * (t.in_features + sum(t.out_features)) for t in targets)


def fits_held(target: CalibrationTarget) -> bool:
    """Whether a decomposition is small enough to be held at all."""
    return _held_bytes(target) <= MOST_BYTES


def _held_bytes(target: CalibrationTarget) -> int:
    """Of W, the vectors and the triangle, in float64."""
    inputs, outputs = target.in_features, sum(target.out_features)
    triangle = inputs**2 if outputs > inputs else 0
    return FLOAT64 * (inputs * outputs + min(inputs, outputs) ** 2 + triangle)


def _decomposition_bytes(target: CalibrationTarget) -> int:
    """While it is made: W twice, the moment, and what the eigendecomposition needs."""
    inputs, outputs = target.in_features, sum(target.out_features)
    side = min(inputs, outputs)
    return FLOAT64 * (2 * inputs * outputs + inputs**2 * (outputs >= inputs) + MATRICES * side**2)
