"""Where A x_ref is kept instead of x_ref, and what that costs and saves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.analyses import noise_analysis, targets_of
from support.factors import factors_of
from torch import Tensor, nn

from calicache.graph_passes import (
    CalibrationTarget,
    Granularity,
    ModelCost,
    Plan,
    StepMode,
    model_cost,
    optimize,
    uniform_schedule,
)
from calicache.graph_passes.factors.statistics import SecondMoments
from calicache.graph_passes.graph.macs import graph_macs
from calicache.graph_passes.rewriting.fold import (
    FLOPS_PER_BYTE,
    choose_folds,
    fold_macs,
    reads_output,
)
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.schedule import anchor_table
from calicache.graph_passes.sites.analysis import Analysis

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode
PLAIN = (REFRESH, CALIBRATE, REUSE)


def layer_targets(
    in_features: int, ranks: Sequence[int], granularity: Granularity = Granularity.LINEAR
) -> list[CalibrationTarget]:
    """Square layers that read one input."""
    return [
        CalibrationTarget(
            name=f"layer{i}",
            granularity=granularity,
            sites=(f"layer{i}",),
            input_node="x",
            nodes=(f"y{i}",),
            weights=(f"layer{i}.weight",),
            in_features=in_features,
            out_features=(in_features,),
            tokens=8,
            rank=rank,
        )
        for i, rank in enumerate(ranks)
    ]


def folds(
    rank: int,
    *,
    in_features: int = 4096,
    siblings: int = 1,
    cheap: int = 1,
    itemsize: int = 4,
    history: int = 1,
) -> int:
    """How many targets of the group are folded, with `cheap` CALIBRATE steps a REFRESH."""
    schedule = [REFRESH, *[CALIBRATE] * cheap] * 2
    targets = layer_targets(in_features, [rank] * siblings)
    return len(choose_folds(targets, schedule, itemsize, history))


@pytest.mark.parametrize(
    ("cheap", "itemsize", "break_even"),
    # 2 r operations on REFRESH against 3 values a CALIBRATE step, 20 operations a byte.
    [(1, 4, 120), (2, 4, 240), (1, 2, 60), (3, 2, 180), (1, 8, 240)],
)
def test_a_site_is_folded_below_break_even(cheap: int, itemsize: int, break_even: int) -> None:
    assert FLOPS_PER_BYTE == 20.0
    assert folds(break_even - 1, cheap=cheap, itemsize=itemsize) == 1
    assert folds(break_even, cheap=cheap, itemsize=itemsize) == 0


@pytest.mark.parametrize(("history", "break_even"), [(1, 120), (2, 200), (3, 280)])
def test_every_kept_refresh_moves_the_break_even(history: int, break_even: int) -> None:
    # A further refresh is read and added to the anchor: 2 values more.
    assert folds(break_even - 1, history=history) == 1
    assert folds(break_even, history=history) == 0


def test_narrow_output_is_read_at_the_price_of_its_own_channels() -> None:
    # out = in / 4: K (y - b) is a quarter of A x, so four times the rank pays.
    (narrow,) = (replace(t, out_features=(1024,)) for t in layer_targets(4096, [479]))
    assert reads_output(narrow)
    assert fold_macs(narrow) == 8 * 479 * 1024
    assert choose_folds([narrow], [REFRESH, CALIBRATE], 4) == {"layer0"}
    assert choose_folds([replace(narrow, rank=480)], [REFRESH, CALIBRATE], 4) == frozenset()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"out_features": (4096,)}, "y is as wide as x"),
        ({"nodes": ("y0", "y1"), "out_features": (8, 8)}, "two outputs"),
        ({"granularity": Granularity.BRANCH, "out_features": (8,)}, "no W between x and y"),
    ],
)
def test_other_targets_make_a_x_from_x(changes: dict, why: str) -> None:
    (target,) = (replace(t, **changes) for t in layer_targets(4096, [3]))
    assert not reads_output(target), why
    assert fold_macs(target) == 8 * 3 * 4096


def test_folded_cache_is_never_the_larger_one() -> None:
    assert folds(16, in_features=16) == 1
    assert folds(17, in_features=16) == 0
    # z of q, k and v together against one x.
    assert folds(5, in_features=16, siblings=3) == 3
    assert folds(6, in_features=16, siblings=3) == 0


def test_rank_zero_beside_another_rank_is_not_folded() -> None:
    assert choose_folds(layer_targets(64, [0, 3, 0]), [REFRESH, CALIBRATE], 4) == {"layer1"}


def test_whole_branches_fold_as_layers_do() -> None:
    whole = layer_targets(64, [3], Granularity.BRANCH)
    assert choose_folds(whole, [REFRESH, CALIBRATE], 4) == {"layer0"}


def test_rank_zero_is_not_folded() -> None:
    assert folds(0) == 0
    assert folds(1) == 1


@settings(max_examples=50, deadline=None)
@given(
    rank=st.integers(0, 80),
    siblings=st.integers(1, 4),
    cheap=st.integers(1, 4),
    itemsize=st.sampled_from([2, 4]),
)
def test_siblings_fold_together_or_not_at_all(
    rank: int, siblings: int, cheap: int, itemsize: int
) -> None:
    got = folds(rank, siblings=siblings, cheap=cheap, itemsize=itemsize)
    assert got in (0, siblings)
    # A group costs what one layer of the summed rank does.
    one = folds(rank * siblings, cheap=cheap, itemsize=itemsize)
    assert got == one * siblings


@pytest.mark.parametrize("schedule", [(REFRESH,), (REFRESH, REUSE), (REFRESH, REUSE, FORECAST) * 2])
def test_schedule_without_calibrate_folds_nothing(schedule: tuple[StepMode, ...]) -> None:
    targets = layer_targets(64, [1])
    assert choose_folds(targets, schedule, 4) == frozenset()
    assert choose_folds(targets, [*schedule, CALIBRATE], 4) == {"layer0"}


def test_optimize_folds_what_the_rule_says(dit: nn.Module, dit_plan: Plan) -> None:
    # Two cheap steps a REFRESH in float32: folded where the group's ranks sum to less than 240.
    few, many = optimize(dit, dit_plan), optimize(dit, dit_plan.with_rank(16))
    folded = [{c.folded for c in fast.compiled.variant_set.caches} - {None} for fast in (few, many)]
    names = {site.name for site in few.compiled.analysis.sites.linears}
    assert folded[0] == names
    # 3 x 16 is more than the 32 channels that q, k and v read.
    assert folded[1] == {name for name in names if name[-2:] not in (".q", ".k", ".v")}


class Chain(nn.Module):
    """A branch of two layers with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return F.gelu(x + self.second(self.first(self.norm(x))))


@pytest.fixture(scope="module", params=["dit", "diffusers", "chain"])
def analysis(request: pytest.FixtureRequest) -> Analysis:
    if request.param == "chain":
        return noise_analysis(Chain())
    return request.getfixturevalue(f"{request.param}_analysis")


def emit(
    analysis: Analysis,
    rank: int,
    modes: Collection[StepMode],
    *,
    fold: bool,
    order: int = 0,
    joint: bool = False,
) -> tuple[VariantSet, ModelCost]:
    captured, sites = analysis.captured, analysis.sites
    targets = targets_of(analysis, rank, joint=joint)
    # Of W alone: a joint group takes the moments of increments that are all alike.
    statistics = {
        target.name: SecondMoments(input=torch.eye(target.in_features))
        for target in targets
        if len(target.nodes) > 1
    }
    factors = factors_of(captured, targets, statistics)
    variant_set = rewrite(
        captured,
        sites,
        targets,
        factors,
        modes,
        folded=frozenset(factors if fold else ()),
        anchors=anchor_table([REFRESH, CALIBRATE], order),
    )
    return variant_set, model_cost(analysis, targets, variant_set)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_macs_are_those_of_the_emitted_graphs(
    analysis: Analysis, rank: int, fold: bool, joint: bool
) -> None:
    variant_set, cost = emit(analysis, rank, PLAIN, fold=fold, joint=joint)
    emitted = {mode: graph_macs(variant_set.variants[mode].module.graph) for mode in PLAIN}
    assert emitted == cost.modes
    assert cost.plain_macs == graph_macs(analysis.captured.graph)
    folding = sum(target.fold_macs for target in cost.targets.values())
    assert cost.modes[REFRESH] == cost.plain_macs + folding
    assert (folding > 0) == (fold and rank > 0)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("fold", [False, True])
def test_bytes_are_those_of_the_emitted_caches(
    analysis: Analysis, fold: bool, order: int, joint: bool
) -> None:
    variant_set, cost = emit(analysis, 3, {CALIBRATE}, fold=fold, order=order, joint=joint)
    emitted = (order + 1) * sum(cache.nbytes for cache in variant_set.caches)
    assert cost.cache_bytes == emitted
    assert emitted == sum(target.cache_bytes for target in cost.targets.values())


def test_folding_makes_the_caches_smaller(analysis: Analysis) -> None:
    plain, folded = (emit(analysis, 2, {CALIBRATE}, fold=fold)[0].caches for fold in (False, True))
    sites = analysis.sites
    outputs = {site.node for site in sites.linears}
    # x_ref of every group, unless it is some site's y_ref anyway, against r values a site.
    widths = {site.input_node: site.in_features for site in sites.linears}
    tokens = sites.linears[0].tokens
    saved = sum(width for node, width in widths.items() if node not in outputs)
    saved -= 2 * len(sites.linears)
    plain_bytes, folded_bytes = (sum(c.nbytes for c in caches) for caches in (plain, folded))
    assert plain_bytes - folded_bytes == 4 * tokens * saved > 0


def test_share_of_a_run_counts_the_fold(dit: nn.Module, dit_plan: Plan) -> None:
    schedule = uniform_schedule(6, 3)
    cost, refreshes = optimize(dit, dit_plan.with_schedule(schedule)).compiled.cost, 2
    assert cost.modes[REFRESH] > cost.plain_macs
    total = refreshes * cost.modes[REFRESH] + (6 - refreshes) * cost.modes[CALIBRATE]
    # float64 quotient of integers.
    expected = pytest.approx(total / (6 * cost.plain_macs), rel=1e-12, abs=0)
    assert cost.run_share(schedule) == expected
