"""Factors of one rank straight from weights and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.factors.covariance import decompose_branch, decompose_increments
from calicache.graph_passes.factors.decompose import CalibrationFactors, decompose_weight
from calicache.graph_passes.factors.factors import Decompositions, make_factors
from calicache.graph_passes.factors.statistics import (
    ChannelStatistics,
    SecondMoments,
    Statistics,
)
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.sites.targets import CalibrationTarget


def decompose(
    weight: Tensor, rank: int, statistics: ChannelStatistics | None = None
) -> CalibrationFactors:
    """The paper's weightings; W itself without statistics."""
    return decompose_weight(weight, statistics).at(rank)


def covariance_factors(
    weights: Sequence[Tensor], rank: int, moments: SecondMoments
) -> CalibrationFactors:
    """One site, or sibling sites stacked."""
    return decompose_increments(weights, moments).at(rank)


def branch_factors(rank: int, moments: SecondMoments, dtype: torch.dtype) -> CalibrationFactors:
    """A whole residual branch."""
    return decompose_branch(moments, dtype).at(rank)


def factors_of(
    captured: CapturedGraph,
    targets: Sequence[CalibrationTarget],
    statistics: Mapping[str, Statistics],
    meter: Meter | None = None,
) -> dict[str, CalibrationFactors]:
    """By name, with nothing decomposed before."""
    return make_factors(captured, targets, statistics, Decompositions(), meter)
