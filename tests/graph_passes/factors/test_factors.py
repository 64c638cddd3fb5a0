"""Factors for every kind of target, from the statistics that belong to it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from model import FashionDiT
from support.factors import branch_factors, covariance_factors, decompose, factors_of
from torch import Tensor

from calicache.graph_passes import (
    CalibrationTarget,
    CapturedGraph,
    Granularity,
    Recording,
    Sites,
    classify_nodes,
    find_sites,
)
from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.statistics import ChannelStatistics, SecondMoments
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.sites.targets import assign

Found = tuple[CapturedGraph, Sites]
FC1, QKV, MLP = "blocks.1.mlp.fc1", "blocks.1.attn.q+k+v", "blocks.1.mlp"


@pytest.fixture(scope="module")
def found(dit: FashionDiT, dit_recording: Recording) -> Found:
    captured = capture(dit, dit_recording.signature)
    return captured, find_sites(captured, classify_nodes(captured, dit_recording.dependence))


def targets_of(found: Found, rank: int = 4, **options: object) -> dict[str, CalibrationTarget]:
    return {target.name: target for target in assign(*found, rank=rank, **options)[0]}


def second_moment(size: int, seed: int) -> Tensor:
    rows = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / len(rows)


def assert_equal(got: CalibrationFactors, expected: CalibrationFactors) -> None:
    assert torch.equal(got.up, expected.up)
    assert torch.equal(got.down, expected.down)
    assert got.energy == expected.energy


def test_targets_are_made_one_by_one_and_reported(found: Found) -> None:
    targets = targets_of(found)
    seen: list[tuple[int, int]] = []
    factors = factors_of(
        found[0], [*targets.values()], {}, lambda done, total: seen.append((done, total))
    )
    assert seen == [(k, 12) for k in range(1, 13)]
    assert list(factors) == list(targets)


def test_no_statistics_mean_the_plain_svd(found: Found, dit: FashionDiT) -> None:
    factors = factors_of(found[0], [targets_of(found)[FC1]], {})
    assert_equal(factors[FC1], decompose(dit.blocks[1].mlp.fc1.weight, 4))


def test_channel_statistics_mean_the_papers_svd(found: Found, dit: FashionDiT) -> None:
    statistics = ChannelStatistics(torch.rand(32), torch.rand(128))
    factors = factors_of(found[0], [targets_of(found)[FC1]], {FC1: statistics})
    assert_equal(factors[FC1], decompose(dit.blocks[1].mlp.fc1.weight, 4, statistics))


def test_second_moments_mean_the_optimum_of_stacked_siblings(found: Found, dit: FashionDiT) -> None:
    target, moments = targets_of(found, joint=True)[QKV], SecondMoments(input=second_moment(32, 1))
    factors = factors_of(found[0], [target], {QKV: moments})
    attention = dit.blocks[1].attn
    weights = [attention.q.weight, attention.k.weight, attention.v.weight]
    assert_equal(factors[QKV], covariance_factors(weights, 6, moments))
    assert (factors[QKV].up.shape, factors[QKV].rank) == ((96, 6), 6)


def test_branches_are_regressed(found: Found) -> None:
    target = targets_of(found, granularity=Granularity.BRANCH)[MLP]
    moments = SecondMoments(input=second_moment(32, 1), cross=torch.randn(32, 32))
    factors = factors_of(found[0], [target], {MLP: moments})
    assert_equal(factors[MLP], branch_factors(4, moments, torch.float32))


def test_rank_0_needs_nothing_and_gets_nothing(found: Found) -> None:
    targets = targets_of(found, rank=0, joint=True)
    seen: list[int] = []
    assert factors_of(found[0], [*targets.values()], {}, lambda k, _: seen.append(k)) == {}
    assert len(seen) == 8


def test_error_names_the_target(found: Found) -> None:
    target = replace(targets_of(found)["blocks.0.attn.q"], rank=33)
    with pytest.raises(DecomposeError, match=r"^decompose: blocks\.0\.attn\.q: rank: expected"):
        factors_of(found[0], [target], {})
    bad = SecondMoments(input=torch.full((32, 32), math.nan))
    with pytest.raises(DecomposeError) as caught:
        factors_of(found[0], [targets_of(found, joint=True)[QKV]], {QKV: bad})
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
    captured = capture(meta, dit_recording.signature)
    sites = find_sites(captured, classify_nodes(captured, dit_recording.dependence))
    target = targets_of((captured, sites), **options)[name]
    factors = factors_of(captured, [target], {})[name]
    assert tuple(factors.down.shape) == (target.rank, target.in_features)
    assert tuple(factors.up.shape) == (sum(target.out_features), target.rank)
    assert factors.up.is_meta
    assert factors.down.is_meta
