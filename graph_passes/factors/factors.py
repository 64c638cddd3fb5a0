"""Calibration factors for every target of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.factors.covariance import branch_factors, covariance_factors
from calicache.graph_passes.factors.decompose import CalibrationFactors, decompose
from calicache.graph_passes.factors.statistics import SecondMoments, Statistics
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.settings.choices import Granularity
from calicache.graph_passes.sites.targets import CalibrationTarget


def make_factors(
    captured: CapturedGraph,
    targets: Sequence[CalibrationTarget],
    statistics: Mapping[str, Statistics],
    on_target: Callable[[int, int], None] | None = None,
) -> dict[str, CalibrationFactors]:
    """Factors by target name; targets of rank 0 need none and get none.

    Args:
        captured: where the weights are.
        targets: from `assign`.
        statistics: by target name; empty for weighting `none`.
        on_target: called as on_target(done, total), for a progress bar.

    Raises:
        DecomposeError: weight or statistics are not finite; with the target's name.
    """
    factors: dict[str, CalibrationFactors] = {}
    for done, target in enumerate(targets, start=1):
        try:
            if target.rank:
                factors[target.name] = _factors(captured, target, statistics.get(target.name))
        except DecomposeError as error:
            raise DecomposeError(
                f"{target.name}: {error.where}",
                expected=error.expected,
                got=error.got,
                fix=error.fix,
            ) from error
        if on_target:
            on_target(done, len(targets))
    return factors


def _factors(
    captured: CapturedGraph, target: CalibrationTarget, statistics: Statistics | None
) -> CalibrationFactors:
    value = captured.node(target.nodes[0]).meta["val"]
    weights = [captured.attribute(name) for name in target.weights]
    parameter = weights[0] if weights else next(captured.module.parameters())
    if parameter.is_meta:
        meta = torch.empty(0, device="meta", dtype=value.dtype)
        down = meta.new_empty(target.rank, target.in_features)
        up = meta.new_empty(sum(target.out_features), target.rank)
        read = None if target.granularity is Granularity.BRANCH else up.T
        return CalibrationFactors(down, up, 0.0, read)
    if target.granularity is Granularity.BRANCH:
        assert isinstance(statistics, SecondMoments)
        made = branch_factors(target.rank, statistics, value.dtype)
        device = parameter.device
        return replace(made, down=made.down.to(device), up=made.up.to(device))
    if isinstance(statistics, SecondMoments):
        return covariance_factors(weights, target.rank, statistics)
    (weight,) = weights
    return decompose(weight, target.rank, statistics)
