"""Arithmetic that planning does beside calls of the model, from shapes alone.

It is counted in the multiply-accumulates of a float32 product that take as long, so that over the
MACs of a call it is a number of calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from calicache.graph_passes.api.scale.memory import FLOAT32, looked_at, node_bytes
from calicache.graph_passes.factors.statistics import statistics_shapes
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.rewriting.fold import FLOPS_PER_BYTE
from calicache.graph_passes.settings.choices import Granularity, StepMode, Weighting
from calicache.graph_passes.sites.targets import CalibrationTarget

# Measured on one server core, n from 384 to 3,072: float32 products at 19 GMAC/s, float64 ones at
# 8, and an eigendecomposition of n columns in the time of 11 to 20 n^3 float32 MACs.
DOUBLE = 2.4
EIGEN = 13.0
HASHED = 50.0  # a byte of the weights, hashed: SHA-256 took 0.6 GB a second beside 30 GMAC/s
MOVES = 3  # reads and writes of an elementwise operation


def moment_macs(targets: Sequence[CalibrationTarget], weighting: Weighting) -> float:
    """Of adding the increments of one CALIBRATE step to the second moments."""
    squares = (
        target.tokens * shape[0] * shape[1]
        for target in targets
        for shape in statistics_shapes(weighting, target).values()
        if len(shape) == 2
    )
    return float(sum(squares))


def increment_macs(
    captured: CapturedGraph,
    targets: Sequence[CalibrationTarget],
    weighting: Weighting,
    schedule: Sequence[StepMode],
    order: int,
) -> float:
    """Of making the increments of one CALIBRATE step: a product and a sum for every refresh."""
    names, refreshes = looked_at(targets, weighting, schedule, order)
    itemsize = max((captured.node(name).meta["val"].element_size() for name in names), default=1)
    moved = node_bytes(captured, names) // itemsize * FLOAT32
    return moved * MOVES * 2 * refreshes * FLOPS_PER_BYTE / 2


def decompose_macs(targets: Sequence[CalibrationTarget], weighting: Weighting) -> float:
    """Of decomposing every target once, and of cutting its factors."""
    return sum(_decompose_macs(target, weighting) for target in targets)


def _decompose_macs(target: CalibrationTarget, weighting: Weighting) -> float:
    inputs, outputs, rank = target.in_features, sum(target.out_features), target.rank
    side, wide = min(inputs, outputs), max(inputs, outputs)
    branch = target.granularity is Granularity.BRANCH
    if weighting is not Weighting.COVARIANCE and not branch:
        return 2 * EIGEN * side**2 * wide  # a singular value decomposition
    doubles = float(rank * inputs * outputs)  # of the factors
    if branch:
        doubles += inputs**3 / 3 + inputs**2 * outputs  # the regression
    if outputs > inputs:  # by the triangle of W
        doubles += inputs**2 * outputs + 3 * inputs**3 + outputs * rank * (inputs + rank)
    elif outputs == inputs or branch:
        doubles += outputs * inputs * (inputs + outputs)
    return DOUBLE * doubles + EIGEN * side**3
