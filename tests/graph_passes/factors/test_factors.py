"""Factors for every kind of target, from the statistics that belong to it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
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
from calicache.graph_passes.factors import factors as factors_module
from calicache.graph_passes.factors.decompose import CalibrationFactors, decompose_weight
from calicache.graph_passes.factors.factors import Decompositions, make_factors
from calicache.graph_passes.factors.statistics import (
    ChannelStatistics,
    SecondMoments,
    Statistics,
)
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


@pytest.mark.slow
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
    target = replace(named_targets(dit_analysis)["blocks.0.attn.q"], rank=33)
    with pytest.raises(DecomposeError, match=r"^decompose: blocks\.0\.attn\.q: rank: expected"):
        factors_of(dit_analysis.captured, [target], {})
    bad = SecondMoments(input=torch.full((32, 32), math.nan))
    with pytest.raises(DecomposeError) as caught:
        factors_of(
            dit_analysis.captured, [named_targets(dit_analysis, joint=True)[QKV]], {QKV: bad}
        )
    assert str(caught.value) == (
        f"decompose: {QKV}: weight or statistics: expected finite values, got NaN or Inf. "
        "Check the checkpoint and the recording."
    )


@pytest.fixture(scope="module")
def meta_analysis(dit: FashionDiT, dit_recording: Recording) -> Analysis:
    return analysis_of(copy.deepcopy(dit).to("meta"), dit_recording)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (FC1, {}),
        (QKV, {"joint": True}),
        (MLP, {"granularity": Granularity.BRANCH}),
    ],
)
def test_meta_weights_give_meta_factors_without_statistics(
    meta_analysis: Analysis, name: str, options: dict[str, object]
) -> None:
    target = named_targets(meta_analysis, **options)[name]
    factors = factors_of(meta_analysis.captured, [target], {})[name]
    assert tuple(factors.down.shape) == (target.rank, target.in_features)
    assert tuple(factors.up.shape) == (sum(target.out_features), target.rank)
    assert factors.up.is_meta
    assert factors.down.is_meta
    assert {factors.up.dtype, factors.down.dtype} == {torch.float32}
    assert factors.spectrum is None
    assert factors.kept_energy() == {}


# --- every target decomposed once -----------------------------------------------------------------

RANKS = (0, 1, 5, 16)


def statistics_for(kind: str) -> Statistics | None:
    """What is decomposed for FC1, QKV or MLP; all of it is small enough to be kept."""
    return {
        "svd": None,
        "channels": ChannelStatistics(torch.rand(32), torch.rand(128)),
        "siblings": SecondMoments(input=second_moment(32, 1)),
        "branch": SecondMoments(input=second_moment(32, 1), cross=torch.randn(32, 32)),
    }[kind]


def target_for(dit_analysis: Analysis, kind: str) -> CalibrationTarget:
    if kind == "siblings":
        return named_targets(dit_analysis, joint=True)[QKV]
    if kind == "branch":
        return named_targets(dit_analysis, granularity=Granularity.BRANCH)[MLP]
    return named_targets(dit_analysis)[FC1]


KINDS = ("svd", "channels", "siblings", "branch")


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_decomposed_once_for_all_ranks(dit_analysis: Analysis, kind: str) -> None:
    target, statistics, kept = (
        target_for(dit_analysis, kind),
        statistics_for(kind),
        Decompositions(),
    )
    given = {} if statistics is None else {target.name: statistics}
    for rank in RANKS:
        ranked = replace(target, rank=rank)
        factors = make_factors(dit_analysis.captured, [ranked], given, kept)
        assert list(factors) == ([target.name] if rank else [])
        if rank:
            # Cut from the same decomposition, or from one of its own: the same float64 program.
            assert_equal(
                factors[target.name],
                factors_of(dit_analysis.captured, [ranked], given)[target.name],
            )
    assert kept.count == 1
    assert kept.of(dit_analysis.captured, target, statistics) is kept.of(
        dit_analysis.captured, target, statistics
    )
    assert kept.count == 1


@pytest.mark.parametrize("rank", [1, 5, 16, 32])
def test_every_rank_is_the_truncated_svd(dit: FashionDiT, rank: int) -> None:
    weight = dit.blocks[1].mlp.fc1.weight.double()
    factors = decompose_weight(weight).at(rank)
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    # Singular vectors from a Gram matrix in float64: 1e-16 squared under the root, and gaps of
    # neighbouring singular values of 1e-2 of the largest, turn the map by 1e-12 of its size.
    product = (factors.up @ factors.down).numpy()
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-10 * s[0])


def test_other_statistics_are_decomposed_again_in_the_place_of_the_first(
    dit_analysis: Analysis,
) -> None:
    target, kept = named_targets(dit_analysis, joint=True)[QKV], Decompositions()
    first, second = (SecondMoments(input=second_moment(32, seed)) for seed in (1, 2))
    one = kept.of(dit_analysis.captured, target, first)
    held = kept.nbytes
    other = kept.of(dit_analysis.captured, target, second)
    assert (kept.count, kept.nbytes, list(kept.held)) == (2, held, [QKV])
    assert not torch.equal(one.at(4).up, other.at(4).up)
    assert kept.of(dit_analysis.captured, target, second) is other
    kept.of(dit_analysis.captured, target, first)
    assert kept.count == 3


def test_equal_statistics_of_another_plan_are_other_statistics(dit_analysis: Analysis) -> None:
    target, kept = named_targets(dit_analysis, joint=True)[QKV], Decompositions()
    for _ in range(2):
        kept.of(dit_analysis.captured, target, SecondMoments(input=second_moment(32, 1)))
    assert kept.count == 2


def test_memory_is_counted_and_never_passes_the_most(
    dit_analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = named_targets(dit_analysis)
    sizes = {n: decompose_weight(weight_of(dit_analysis, t)).nbytes() for n, t in targets.items()}
    most = sum(list(sizes.values())[:3]) + 1
    monkeypatch.setattr(factors_module, "MOST_BYTES", most)
    monkeypatch.setattr(factors_module, "MOST_FACTOR_BYTES", 0)
    kept = Decompositions()
    for _ in range(2):
        make_factors(dit_analysis.captured, [*targets.values()], {}, kept)
        # Which are held is a matter of which thread is done first.
        assert 0 < kept.nbytes == sum(sizes[name] for name in kept.held) <= most
    # What did not fit was decomposed at every request.
    assert kept.count == len(targets) + len(targets) - len(kept.held)


def test_what_is_too_large_keeps_its_last_factors(
    dit_analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors_module, "MOST_BYTES", 0)
    target, kept = named_targets(dit_analysis)[FC1], Decompositions()

    def factors(rank: int, statistics: Statistics | None = None) -> CalibrationFactors:
        given = {} if statistics is None else {FC1: statistics}
        ranked = replace(target, rank=rank)
        return make_factors(dit_analysis.captured, [ranked], given, kept)[FC1]

    first = factors(4)
    assert factors(4).up is first.up
    assert (kept.count, kept.nbytes, kept.held, list(kept.cuts)) == (1, 0, {}, [FC1])
    # Another rank, or other statistics: decomposed again, and held in the place of the first.
    assert (factors(2).rank, kept.count) == (2, 2)
    assert_equal(factors(4), first)
    seen = SecondMoments(input=second_moment(32, 1))
    assert not torch.equal(factors(4, seen).up, first.up)
    assert (factors(4, seen).rank, kept.count, len(kept.cuts)) == (4, 4, 1)


def test_what_is_far_too_large_is_decomposed_at_every_request(
    dit_analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors_module, "MOST_BYTES", 0)
    monkeypatch.setattr(factors_module, "MOST_FACTOR_BYTES", 0)
    target, kept = named_targets(dit_analysis)[FC1], Decompositions()
    first, second = (make_factors(dit_analysis.captured, [target], {}, kept)[FC1] for _ in range(2))
    assert (kept.count, kept.nbytes, kept.held, kept.cuts) == (2, 0, {}, {})
    assert_equal(first, second)


def weight_of(dit_analysis: Analysis, target: CalibrationTarget) -> Tensor:
    (name,) = target.weights
    return dit_analysis.captured.attribute(name)
