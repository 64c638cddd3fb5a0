"""Cache folding: where to keep z_ref = A x_ref (rank r) instead of x_ref (in channels).

Only A x_ref is ever used, so y = y* + B (A x - z*) is the same map with a smaller cache and a
subtraction over r instead of `in` channels. It costs one thin GEMM on a REFRESH step: A x from x,
or K (y - b) from y where y has fewer channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from calicache.graph_passes.settings.choices import BranchKind, Granularity, StepMode
from calicache.graph_passes.sites.targets import CalibrationTarget

# Floating-point operations of a float32 GEMM in the time one byte of memory moves. Measured
# on two server cores: 180 to 400 GFLOP/s against 18 GB/s. Only the order of magnitude matters.
FLOPS_PER_BYTE = 20.0


def choose_folds(
    targets: Sequence[CalibrationTarget],
    schedule: Sequence[StepMode],
    itemsize: int,
    history: int = 1,
) -> frozenset[str]:
    """Names of the targets to fold; targets that read one x share x_ref and so fold together.

    Per token and interval, folding adds 2 (sum of r) in operations on REFRESH (r out where A x is
    read off y), and saves on every CALIBRATE step a subtraction that moves 3 in values, and 2 in
    more for every further kept refresh.

    Args:
        targets: what CALIBRATE replaces.
        schedule: mode of every step.
        itemsize: bytes of one cached value.
        history: how many refreshes are kept.
    """
    reads = reads_per_refresh(schedule, history)
    folded = (g.targets for g in fold_groups(targets, itemsize) if g.threshold < reads)
    return frozenset(target.name for group in folded for target in group if target.rank)


def reads_per_refresh(schedule: Sequence[StepMode], history: int) -> float:
    """How often a CALIBRATE step reads or writes `in` values between two REFRESH steps."""
    cheap = schedule.count(StepMode.CALIBRATE) / schedule.count(StepMode.REFRESH)
    return cheap * (1 + 2 * history)


@dataclass(frozen=True, slots=True)
class FoldGroup:
    """Targets that read one x, and so fold together.

    Attributes:
        targets: of the group.
        threshold: the `reads_per_refresh` from which on folding pays; infinite where it never does.
    """

    targets: tuple[CalibrationTarget, ...]
    threshold: float


def fold_groups(targets: Sequence[CalibrationTarget], itemsize: int) -> list[FoldGroup]:
    """Targets by the x that they read, with what folding them needs."""
    readers: dict[str, list[CalibrationTarget]] = {}
    for target in targets:
        readers.setdefault(target.input_node, []).append(target)
    groups = []
    for group in readers.values():
        rank, channels = sum(target.rank for target in group), group[0].own_features[0]
        operations = 2 * sum(_macs_of_a_token(target) for target in group)
        threshold = math.inf
        whole = any(target.branch is BranchKind.INT8 for target in group)  # needs x itself
        if operations > 0 and rank <= channels and not whole:
            threshold = operations / (itemsize * FLOPS_PER_BYTE * channels)
        groups.append(FoldGroup(tuple(group), threshold))
    return groups


def reads_output(target: CalibrationTarget) -> bool:
    """Whether A x is cheaper to read off y than to make from x; of a split layer y is no whole."""
    linear = target.granularity is Granularity.LINEAR and len(target.nodes) == 1
    return linear and not target.shard and target.out_features[0] < target.in_features


def fold_macs(target: CalibrationTarget) -> int:
    """Multiply-accumulates of A x on a REFRESH step."""
    return target.tokens * _macs_of_a_token(target)


def _macs_of_a_token(target: CalibrationTarget) -> int:
    channels = target.out_features[0] if reads_output(target) else target.own_features[0]
    return target.rank * channels
