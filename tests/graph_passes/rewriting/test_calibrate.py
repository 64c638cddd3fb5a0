"""Anchors, corrections and mixed outputs, against oracles written from the formulas."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import pytest
import torch
import torch.nn.functional as F
from model import FashionDiT
from support.analyses import analysis_of, targets_of
from support.factors import factors_of
from support.golden import graph_text
from support.models import modes, relative, shake
from torch import Tensor, fx, nn

from calicache.graph_passes import (
    CalibrationTarget,
    CapturedGraph,
    Granularity,
    Plan,
    Recording,
    SiteMode,
    SiteRule,
    Sites,
    StepMode,
    Weighting,
    optimize,
    record,
)
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.graph.macs import graph_macs
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.rewriting.checks import verify_variants
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.schedule import Table, anchor_table, output_table

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode
aten = torch.ops.aten

# float32 sums of a few terms in another order; anchors of order 2 add up values 6 times as large.
RTOL, ATOL = 1e-4, 2e-5


# Refreshes at 0, 2, 3, 7: uneven, and fewer than three of them before the steps 1 to 3.
SCHEDULE = modes("RCRRCUCRCUF")


class Siblings(nn.Module):
    """x + out(gelu(q x) * k x + v x): three layers read one value, one reads what they make."""

    def __init__(self, *, head: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 16) for _ in range(3))
        self.out = nn.Linear(16, 8)
        self.head = nn.Linear(8, 6) if head else nn.Identity()

    def inside(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.gelu(q) * k + v

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n = self.norm(x)
        return self.head(x + self.out(self.inside(self.q(n), self.k(n), self.v(n))))


@dataclass
class Case:
    """A model, what it is fed step by step, and its rewritten form."""

    model: nn.Module
    inputs: list[Tensor]
    captured: CapturedGraph
    sites: Sites
    targets: tuple[CalibrationTarget, ...]
    factors: dict[str, CalibrationFactors]
    variant_set: VariantSet

    def play(self) -> list[Tensor]:
        """The outputs of all steps of SCHEDULE."""
        kept: dict[str, tuple[Tensor, ...]] = {}
        outputs: list[Tensor] = []
        for step, (mode, x) in enumerate(zip(SCHEDULE, self.inputs, strict=True)):
            variant = self.variant_set.variants[mode]
            weights = self.variant_set.weights_of(step)
            values = self.variant_set.read(variant.reads, kept, weights, x.device)
            results = variant.module(x, *values)
            for name, value in zip(variant.writes, results[1:], strict=True):
                kept[name] = (value, *kept.get(name, ()))[: self.variant_set.history]
            outputs.append(results[0])
        return outputs

    def low(self, target: str) -> Tensor:
        """B A of a target (out, in)."""
        return self.factors[target].up @ self.factors[target].down

    def graph(self, mode: StepMode) -> fx.Graph:
        return self.variant_set.variants[mode].module.graph


@cache
def siblings(head: bool) -> nn.Module:
    """One for all tests, so that it is captured once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(Siblings(head=head), 0.2)


def make(
    order: int,
    *,
    fold: bool = False,
    joint: bool = False,
    rank: int = 3,
    granularity: Granularity = Granularity.LINEAR,
    rules: Sequence[SiteRule] = (),
    outputs: Table | None = None,
    head: bool = False,
) -> Case:
    model = siblings(head)
    inputs = [torch.randn(2, 5, 8) for _ in SCHEDULE]
    with record(model) as recording, torch.no_grad():
        for x in inputs:
            model(x)
    analysis = analysis_of(model, recording)
    captured, sites = analysis.captured, analysis.sites
    targets = targets_of(analysis, rank, granularity=granularity, rules=rules, joint=joint)
    weighting = Weighting.COVARIANCE if joint else Weighting.NONE
    statistics = observe(captured, targets, recording, weighting, SCHEDULE, order)
    factors = factors_of(captured, targets, statistics)
    variant_set = rewrite(
        captured,
        sites,
        targets,
        factors,
        set(StepMode),
        folded=frozenset(factors if fold else ()),
        anchors=anchor_table(SCHEDULE, order),
        outputs=output_table(SCHEDULE, order) if outputs is None else outputs,
    )
    verify_variants(captured, variant_set)
    return Case(model, inputs, captured, sites, targets, factors, variant_set)


def kept_before(step: int, order: int) -> list[int]:
    return [k for k in range(step) if SCHEDULE[k] is REFRESH][-order - 1 :]


def anchor(values: Sequence[Tensor], step: int, order: int) -> Tensor:
    """Lagrange's formula through the last order + 1 refreshes, or as many as there are."""
    return through(values, kept_before(step, order), step)


def outputs_before(step: int, order: int) -> list[int]:
    return [k for k in range(step) if SCHEDULE[k] in (REFRESH, CALIBRATE)][-order - 1 :]


def through(values: Sequence[Tensor], places: Sequence[int], step: int) -> Tensor:
    parts = [values[i] * prod((step - j) / (i - j) for j in places if j != i) for i in places]
    return torch.stack(parts).sum(dim=0)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=RTOL, atol=ATOL)


# --- anchors ----------------------------------------------------------------------------------


def test_schedule_of_these_tests_is_uneven_and_starts_short() -> None:
    assert [kept_before(step, 2) for step in (1, 4, 6, 8)] == [[0], [0, 2, 3], [0, 2, 3], [2, 3, 7]]
    # By hand: through 2, 3 and 7 at 8, L_2 = 5*1/(1*5), L_3 = 6*1/(1*4), L_7 = 6*5/(5*4).
    newest_first = (30 / 20, -6 / 4, 5 / 5)
    assert anchor_table(SCHEDULE, 2)[8] == pytest.approx(newest_first, rel=1e-12)  # float64
    assert anchor_table(SCHEDULE, 2)[1] == (1.0, 0.0, 0.0)
    assert anchor_table(SCHEDULE, 1)[4] == (2.0, -1.0)


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize("fold", [False, True], ids=["x kept", "A x kept"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_calibrated_and_reused_steps_are_what_the_formulas_say(
    order: int, fold: bool, joint: bool
) -> None:
    case = make(order, fold=fold, joint=joint)
    model, got = case.model, case.play()
    # True values of every step; only those of refreshes are looked at.
    e = [model.embed(x) for x in case.inputs]
    n = [model.norm(x) for x in e]
    ys = [[layer(x) for x in n] for layer in (model.q, model.k, model.v)]
    hidden = [model.inside(*(y[step] for y in ys)) for step in range(len(SCHEDULE))]
    o = [model.out(h) for h in hidden]
    lows = case.low("q+k+v").split(16) if joint else [case.low(name) for name in "qkv"]
    for step, mode in enumerate(SCHEDULE):
        if mode is REFRESH:
            close(got[step], e[step] + o[step])
        elif mode is REUSE:
            close(got[step], e[step] + anchor(o, step, order))
        elif mode is CALIBRATE:
            increment = n[step] - anchor(n, step, order)
            calibrated = [
                anchor(y, step, order) + increment @ low.T for y, low in zip(ys, lows, strict=True)
            ]
            inner = model.inside(*calibrated) - anchor(hidden, step, order)
            expected = e[step] + anchor(o, step, order) + inner @ case.low("out").T
            close(got[step], expected)


def test_of_calibrated_steps_the_output_alone_enters_the_history() -> None:
    case = make(2)
    plain = case.play()
    # A refresh writes what the plain model computes, whatever ran before it: the next step
    # is the same in a run whose cheap steps saw something else.
    noisy = [
        x if mode is REFRESH else x + 5.0 for mode, x in zip(SCHEDULE, case.inputs, strict=True)
    ]
    noisy[-1], noisy[8] = case.inputs[-1], case.inputs[8]
    case.inputs = noisy
    again = case.play()
    for step in (4, 10):  # the forecast at 10 reads the output of 6
        assert not torch.equal(again[step], plain[step])
    for step in (0, 2, 3, 7, 8):
        assert torch.equal(again[step], plain[step])  # the same program on the same numbers


@pytest.mark.slow
def test_optimized_model_keeps_order_plus_one_refreshes_newest_first(
    dit: FashionDiT, forecast_plan: Plan, dit_recording: Recording
) -> None:
    fast = optimize(dit, forecast_plan)  # R C R U R F
    seen = []
    for call in dit_recording.calls:
        before = dict(*(state.kept for state in fast.state.calls))  # one call a step
        fast(**call)
        (state,) = fast.state.calls
        kept = state.kept
        writes = fast.compiled.variant_set.variants[fast.plan.schedule[fast.step - 1]].writes
        for name, values in kept.items():
            earlier = before.get(name, ())
            if name in writes:
                assert all(a is b for a, b in zip(values[1:], earlier, strict=False))
                assert all(values[0] is not value for value in earlier)
            else:
                assert values == earlier
        lengths = {name.startswith("cache_output"): len(values) for name, values in kept.items()}
        seen.append((lengths[False], lengths[True]))
    assert seen == [(1, 1), (1, 2), (2, 3), (2, 3), (3, 3), (3, 3)]


# --- what a target becomes --------------------------------------------------------------------


def products(graph: fx.Graph, part: str) -> list[str]:
    """Factors of linear layers whose name ends so, in graph order."""
    targets = [str(n.args[1].target) for n in graph.nodes if n.target is LINEAR]
    return [t for t in targets if t.startswith("calibration.") and f".{part}" in t]


def test_joint_group_makes_one_down_product_for_all_siblings() -> None:
    apart, joint = make(2), make(2, joint=True)
    assert [t.name for t in joint.targets] == ["q+k+v", "out"]
    # q, k and v apart cost 3 * 3 (8 + 16); one map of rank r costs r (8 + 48): r = 3.
    assert joint.targets[0].rank == 3
    assert len(products(apart.graph(CALIBRATE), "down_factor")) == 4
    assert products(joint.graph(CALIBRATE), "down_factor") == [
        "calibration.q+k+v.down_factor",
        "calibration.out.down_factor",
    ]
    assert products(joint.graph(CALIBRATE), "up_") == [
        *(f"calibration.q+k+v.up_{k}_factor" for k in range(3)),
        "calibration.out.up_factor",
    ]


def test_joint_group_computes_x_minus_its_anchor_once() -> None:
    for joint in (False, True):
        graph = make(1, joint=joint).graph(CALIBRATE)
        assert sum(n.target is aten.sub.Tensor for n in graph.nodes) == 2  # n, and hidden


def test_site_that_is_reused_returns_its_anchor() -> None:
    case = make(2, rules=[SiteRule("v", SiteMode.REUSE), SiteRule("out", SiteMode.FULL)])
    assert [(t.name, t.rank) for t in case.targets] == [("q", 3), ("k", 3), ("v", 0)]
    assert "v" not in case.factors
    model, got = case.model, case.play()
    e = [model.embed(x) for x in case.inputs]
    n = [model.norm(x) for x in e]
    for step, mode in enumerate(SCHEDULE):
        if mode is CALIBRATE:
            increment = n[step] - anchor(n, step, 2)
            q, k = (
                anchor([layer(x) for x in n], step, 2) + increment @ case.low(name).T
                for name, layer in (("q", model.q), ("k", model.k))
            )
            v = anchor([model.v(x) for x in n], step, 2)
            close(got[step], e[step] + model.out(model.inside(q, k, v)))


def test_rank_zero_returns_the_anchor_of_the_last_layer_alone() -> None:
    case = make(1, rank=0)
    assert case.factors == {}
    # The branch ends in `out`: its anchor is all that a CALIBRATE step needs, as on REUSE.
    variants = case.variant_set.variants
    assert set(variants[CALIBRATE].reads) == set(variants[REUSE].reads)
    assert graph_macs(case.graph(CALIBRATE)) == graph_macs(case.graph(REUSE))
    model, got = case.model, case.play()
    e = [model.embed(x) for x in case.inputs]
    branch = [model(x) - skip for x, skip in zip(case.inputs, e, strict=True)]
    for step, mode in enumerate(SCHEDULE):
        if mode is CALIBRATE:
            close(got[step], e[step] + anchor(branch, step, 1))


def test_full_site_stays_as_in_the_plain_graph() -> None:
    case = make(2, rules=[SiteRule("k", SiteMode.FULL)])
    assert "k" not in {t.name for t in case.targets}
    (site,) = [site for site in case.sites.linears if site.name == "k"]
    plain = case.captured.node(site.node)
    (node,) = [n for n in case.graph(CALIBRATE).nodes if n.name == site.node]
    assert node.format_node() == plain.format_node()
    assert [user.name for user in node.users] == [user.name for user in plain.users]
    assert not [c for c in case.variant_set.caches if c.node == site.node]


def test_full_branch_is_the_model_itself() -> None:
    case = make(2, rules=[SiteRule("model", SiteMode.FULL)])
    assert case.targets == ()
    got = case.play()
    for step, mode in enumerate(SCHEDULE):
        if mode is CALIBRATE:
            close(got[step], case.model(case.inputs[step]))  # the plain graph, over rows


def test_reused_branch_returns_its_anchor_as_on_reuse() -> None:
    case = make(2, rules=[SiteRule("model", SiteMode.REUSE)])
    assert [(t.granularity, t.rank) for t in case.targets] == [(Granularity.BRANCH, 0)]
    # But for what they return: CALIBRATE keeps its output.
    calibrate, reuse = (graph_text(case.graph(mode)).splitlines() for mode in (CALIBRATE, REUSE))
    assert calibrate[:-1] == reuse[:-1]
    assert (calibrate[-1], reuse[-1]) == ("return (add_tensor_4, add_1)", "return (add_tensor_4,)")


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_calibrated_branch_is_its_anchor_plus_one_map_of_its_entry(order: int, fold: bool) -> None:
    case = make(order, granularity=Granularity.BRANCH, fold=fold)
    (target,) = case.targets
    assert (target.name, target.sites, target.rank) == ("model", ("q", "k", "v", "out"), 3)
    assert target.nodes == case.sites.branches[0].exits
    model, got = case.model, case.play()
    e = [model.embed(x) for x in case.inputs]
    y = [model(x) - skip for x, skip in zip(case.inputs, e, strict=True)]
    for step, mode in enumerate(SCHEDULE):
        if mode is CALIBRATE:
            correction = (e[step] - anchor(e, step, order)) @ case.low("model").T
            close(got[step], e[step] + anchor(y, step, order) + correction)
    # Nothing inside runs: embed, A and B.
    assert sum(n.target is LINEAR for n in case.graph(CALIBRATE).nodes) == 3


# --- forecasts and mixed outputs --------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True], ids=["output is a sum", "output is a layer"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_forecast_is_the_weighted_sum_of_kept_outputs_and_runs_no_product(
    order: int, head: bool
) -> None:
    case = make(order, head=head)
    graph = case.graph(FORECAST)
    assert graph_macs(graph) == 0
    assert {n.op for n in graph.nodes} == {"placeholder", "call_function", "output"}
    assert graph_macs(case.graph(REUSE)) > 0
    got, step = case.play(), SCHEDULE.index(FORECAST)
    close(got[step], through(got, outputs_before(step, order), step))


@pytest.mark.parametrize("head", [False, True], ids=["output is a sum", "output is a layer"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_outputs_are_mixed_as_the_table_says(order: int, head: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(len(SCHEDULE), order + 2, generator=draw).tolist()
    for step, row in enumerate(rows):  # no weight for outputs that have not been
        seen = len(outputs_before(step, order))
        row[1 + seen :] = [0.0] * (order + 1 - seen)
    torch.manual_seed(0)
    plain = make(order, head=head)  # the same weights and inputs
    torch.manual_seed(0)
    mixed = make(order, outputs=tuple(map(tuple, rows)), head=head)
    own, got = plain.play(), mixed.play()
    for step, mode in enumerate(SCHEDULE):
        w0, *w = rows[step]
        expected = torch.zeros_like(own[step]) if mode is FORECAST else w0 * own[step]
        # Kept are the outputs that steps computed, not what they returned.
        for weight, k in zip(w, reversed(outputs_before(step, order)), strict=False):
            expected = expected + weight * own[k]
        close(got[step], expected)
    assert {mode for mode, row in zip(SCHEDULE, rows, strict=True) if row[0]} == set(StepMode)


def test_forecast_of_an_output_that_is_no_float_is_refused() -> None:
    class Labels(Siblings):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return y, y.argmax(dim=-1)

    model = shake(Labels())
    with record(model) as recording, torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 5, 8))
    plan = Plan.from_trajectory(
        model, recording, rank=2, schedule=modes("RCU"), correct=False, order=1
    )
    optimize(model, plan)  # fits
    with pytest.raises(PlanError, match=r"output argmax: expected a floating-point.*int64"):
        optimize(model, plan.with_schedule(modes("RUF")))


# --- the whole model --------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_full_rank_calibration_equals_the_model(
    dit: FashionDiT, dit_recording: Recording, order: int
) -> None:
    plan = Plan.from_trajectory(
        dit, dit_recording, rank=32, schedule=modes("RCRRCC"), order=order, correct=False
    )
    fast = optimize(dit, plan)
    for call in dit_recording.calls:
        # Full rank leaves float32 rounding: 6e-8, times weights of anchors up to 10 in
        # magnitude (order 2, two steps ahead), through two blocks. Measured: below 1e-7.
        assert relative(fast(**call), dit(**call)) < 1e-6


@pytest.mark.parametrize("order", [0, 2])
def test_all_refresh_is_the_model_bit_for_bit(
    dit: FashionDiT, dit_recording: Recording, order: int
) -> None:
    plan = Plan.from_trajectory(
        dit, dit_recording, rank=4, schedule=(REFRESH,) * 6, order=order, correct=False
    )
    fast = optimize(dit, plan)
    assert fast.compiled.variant_set.caches == ()
    for call in dit_recording.calls:
        assert torch.equal(fast(**call), dit(**call))  # the same kernels on the same numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_anchors_do_not_change_the_dtype(dtype: torch.dtype) -> None:
    case = make(2)
    model = copy.deepcopy(case.model).to(dtype)
    with record(model) as recording, torch.no_grad():
        for x in case.inputs:
            model(x.to(dtype))
    plan = Plan.from_trajectory(model, recording, rank=3, schedule=SCHEDULE, correct=False)
    fast = optimize(model, plan)
    for x in case.inputs:
        assert fast(x.to(dtype)).dtype is dtype
        (state,) = fast.state.calls
        assert {v.dtype for kept in state.kept.values() for v in kept} == {dtype}
