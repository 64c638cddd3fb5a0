"""Factors for every kind of target, from the statistics that belong to it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model import FashionDiT
from support.analyses import analysis_of, targets_of
from support.factors import branch_factors, covariance_factors, decompose, factors_of
from torch import Tensor

from calicache.graph_passes import (
    CalibrationTarget,
    Granularity,
    Recording,
)
from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.common.progress import Meter, Progress
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.statistics import ChannelStatistics, SecondMoments
from calicache.graph_passes.sites.analysis import Analysis

FC1, QKV, MLP = "blocks.1.mlp.fc1", "blocks.1.attn.q+k+v", "blocks.1.mlp"


def named_targets(
    analysis: Analysis, rank: int = 4, **options: object
) -> dict[str, CalibrationTarget]:
    return {target.name: target for target in targets_of(analysis, rank, **options)}


def second_moment(size: int, seed: int) -> Tensor:
    rows = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / len(rows)


def assert_equal(got: CalibrationFactors, expected: CalibrationFactors) -> None:
    assert torch.equal(got.up, expected.up)
    assert torch.equal(got.down, expected.down)
    assert got.energy == expected.energy


def test_targets_are_made_one_by_one_and_reported(dit_analysis: Analysis) -> None:
    targets = named_targets(dit_analysis)
    seen: list[Progress] = []
    meter = Meter(12, seen.append)
    factors = factors_of(dit_analysis.captured, [*targets.values()], {}, meter)
    assert [(progress.done, progress.total) for progress in seen] == [(k, 12) for k in range(1, 13)]
    assert list(factors) == list(targets)


def test_no_statistics_mean_the_plain_svd(dit_analysis: Analysis, dit: FashionDiT) -> None:
    factors = factors_of(dit_analysis.captured, [named_targets(dit_analysis)[FC1]], {})
    assert_equal(factors[FC1], decompose(dit.blocks[1].mlp.fc1.weight, 4))


def test_channel_statistics_mean_the_papers_svd(dit_analysis: Analysis, dit: FashionDiT) -> None:
    statistics = ChannelStatistics(torch.rand(32), torch.rand(128))
    factors = factors_of(
        dit_analysis.captured, [named_targets(dit_analysis)[FC1]], {FC1: statistics}
    )
    assert_equal(factors[FC1], decompose(dit.blocks[1].mlp.fc1.weight, 4, statistics))


def test_second_moments_mean_the_optimum_of_stacked_siblings(
    dit_analysis: Analysis, dit: FashionDiT
) -> None:
    target, moments = (
        named_targets(dit_analysis, joint=True)[QKV],
        SecondMoments(input=second_moment(32, 1)),
    )
    factors = factors_of(dit_analysis.captured, [target], {QKV: moments})
    attention = dit.blocks[1].attn
    weights = [attention.q.weight, attention.k.weight, attention.v.weight]
    assert_equal(factors[QKV], covariance_factors(weights, 6, moments))
    assert (factors[QKV].up.shape, factors[QKV].rank) == ((96, 6), 6)


def test_branches_are_regressed(dit_analysis: Analysis) -> None:
    target = named_targets(dit_analysis, granularity=Granularity.BRANCH)[MLP]
    moments = SecondMoments(input=second_moment(32, 1), cross=torch.randn(32, 32))
    factors = factors_of(dit_analysis.captured, [target], {MLP: moments})
    assert_equal(factors[MLP], branch_factors(4, moments, torch.float32))


def test_rank_0_needs_nothing_and_gets_nothing(dit_analysis: Analysis) -> None:
    targets = named_targets(dit_analysis, rank=0, joint=True)
    meter = Meter(8)
    assert factors_of(dit_analysis.captured, [*targets.values()], {}, meter) == {}
    assert meter.done == 8


def test_error_names_the_target(dit_analysis: Analysis) -> None:
    bad = SecondMoments(input=torch.full((32, 32), math.nan))
    with pytest.raises(DecomposeError) as caught:
        factors_of(
            dit_analysis.captured, [named_targets(dit_analysis, joint=True)[QKV]], {QKV: bad}
        )
    assert str(caught.value) == (
        f"decompose: {QKV}: weight or statistics: expected finite values, got NaN or Inf. "
        "Check the checkpoint and the recorded recording."
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (FC1, {}),
        (QKV, {"joint": True}),
        (MLP, {"granularity": Granularity.BRANCH}),
    ],
)
def test_meta_weights_give_meta_factors_without_statistics(
    dit: FashionDiT, dit_recording: Recording, name: str, options: dict[str, object]
) -> None:
    meta = copy.deepcopy(dit).to("meta")
    analysis = analysis_of(meta, dit_recording)
    target = named_targets(analysis, **options)[name]
    factors = factors_of(analysis.captured, [target], {})[name]
    assert tuple(factors.down.shape) == (target.rank, target.in_features)
    assert tuple(factors.up.shape) == (sum(target.out_features), target.rank)
    assert factors.up.is_meta
    assert factors.down.is_meta
