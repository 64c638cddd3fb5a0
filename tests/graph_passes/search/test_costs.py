"""What cheap steps cost, against what is counted on the graphs that do it; what they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from diffusion import GuidedDDIM
from hypothesis import given, settings
from hypothesis import strategies as st
from model import FashionDiT
from support.factors import factors_of
from support.search.known import Known, learn
from torch import Tensor, fx, nn
from weights import DIT_WEIGHTS, load_weights

from calicache.graph_passes import (
    CalibrationTarget,
    Granularity,
    Plan,
    Recording,
    SiteMode,
    SiteRule,
    StepMode,
    optimize,
    record,
)
from calicache.graph_passes.graph.macs import graph_macs, node_macs
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.sampler.kept import Kept, run_step
from calicache.graph_passes.search.allocate import RankCurve, allocate
from calicache.graph_passes.search.costs import StepShares, macs_shares
from calicache.graph_passes.settings.latency import BranchChoice
from calicache.graph_passes.sites.targets import assign

R, C, U, FORECAST = StepMode
FULL, LINEAR, INT8, BRANCH, REUSE = BranchChoice
TEXT_MACS = 2 * 2 * 2 * 7 * 20 * 24  # k and v of 2 blocks, of 2 samples of 7 tokens
# Sums of fewer than 100 doubles.
EXACT = {"rel_tol": 1e-9, "abs_tol": 1e-12}


# --- costs in MACs ------------------------------------------------------------------------------


@pytest.mark.slow
def test_branches_have_all_choices_and_sites_outside_have_two(text_known: Known) -> None:
    options = text_known.options()
    names = [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attn1", "attn2", "mlp")]
    assert list(options) == [*names, "between"]
    for name in names:
        assert [option.choice for option in options[name]] == [FULL, LINEAR, BRANCH, REUSE]
        assert {option.patterns for option in options[name]} == {(name,)}
        full, linear, whole, reuse = options[name]
        assert (full.cost, full.curves) == (0.0, ())
        assert {c.target.granularity for c in linear.curves} == {Granularity.LINEAR}
        assert [c.target.name for c in whole.curves] == [name]
        assert (reuse.curves, reuse.cost) == (whole.curves, whole.cost)
    assert [option.choice for option in options["between"]] == [FULL, LINEAR]
    assert options["between"][0].patterns == ("between",)
    assert [c.target.name for c in options["between"][1].curves] == ["between"]


def unforeseen_macs(known: Known, targets: Sequence[CalibrationTarget], graph: fx.Graph) -> int:
    """Of what the targets do not replace and yet nothing needs any more in a CALIBRATE step.

    Projections of the text, which are kept over a run; modulations of branches that are not
    computed; and whatever comes before a layer of the stream that returns its anchor, other
    calibration branches included.
    """
    left = {node.name for node in graph.nodes}
    inside = {branch.name: branch.nodes for branch in known.sites.branches}
    whole = {t.name for t in targets if t.granularity is Granularity.BRANCH}
    replaced = {node for name in whole for node in inside[name]}
    replaced |= {node for target in targets for node in target.nodes}
    gone = sum(
        node_macs(node)
        for node in known.captured.graph.nodes
        if node.op != "output" and node.name not in left | replaced
    )
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    dead = [t for t in targets if t.rank and f"calibration.{t.name}.down_factor" not in read]
    return gone + sum(target.calibrate_macs for target in dead)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
def test_cost_is_what_the_optimised_step_is_counted_to_take(known: Known, level: float) -> None:
    allocation = allocate(known.options(), level)
    targets = known.planned(allocation)
    graph = known.variant_set(targets, C).variants[C].module.graph
    unforeseen = unforeseen_macs(known, targets, graph)
    expected = (graph_macs(graph) + unforeseen) / known.plain
    assert math.isclose(allocation.cost, expected, **EXACT)
    texts = 0 if isinstance(known.model, FashionDiT) else TEXT_MACS
    assert unforeseen >= texts
    if all(rule.mode is SiteMode.FULL for rule in allocation.rules) and all(
        allocation.ranks.values()
    ):
        assert unforeseen == texts


@pytest.mark.slow
def test_allocations_at_rising_cost_use_every_choice(known: Known) -> None:
    # Or the comparison above would be about some of them alone.
    options = known.options()
    chosen: set[BranchChoice] = set()
    for place in range(101):
        chosen |= set(allocate(options, place / 100).choices.values())
    assert chosen >= {FULL, LINEAR, BRANCH}


@pytest.mark.parametrize("choice", [LINEAR, BRANCH, REUSE])
def test_cost_of_every_choice_is_what_the_graph_saves(known: Known, choice: BranchChoice) -> None:
    options = known.options()
    bare = known.variant_set((), C).variants[C].module.graph
    start = graph_macs(bare) + unforeseen_macs(known, (), bare)
    assert start == known.plain
    for name in [name for name in options if not name.startswith("blocks.1")]:
        matches = [option for option in options[name] if option.choice is choice]
        if not matches:
            continue
        # All other branches in full; this one at rank 8 of every target.
        others = {n: [o[0]] for n, o in options.items() if n != name}
        wanted = replace(matches[0], curves=tuple(map(_only_rank_8, matches[0].curves)))
        allocation = allocate({**others, name: [wanted]}, 1e9)
        targets = known.planned(allocation)
        assert {t.rank for t in targets} == ({0} if choice is REUSE else {8})
        graph = known.variant_set(targets, C).variants[C].module.graph
        total = graph_macs(graph) + unforeseen_macs(known, targets, graph)
        assert math.isclose(allocation.cost, total / known.plain, **EXACT), name


def _only_rank_8(curve: RankCurve) -> RankCurve:
    return replace(curve, errors=(1.0, 0.0))


@pytest.mark.slow
def test_plan_of_an_allocation_is_optimised_to_its_cost(dit_known: Known) -> None:
    known, binding = dit_known, bind(dit_known.model, dit_known.recording)
    costs = []
    for level in (0.4, 0.7):
        allocation = allocate(known.options(), level)
        plan = Plan(binding, known.recipe(allocation), known.survey.moments)
        fast = optimize(known.model, plan)
        assert {t.name: t.rank for t in fast.compiled.targets} == dict(allocation.ranks)
        assert fast.compiled.targets == known.planned(allocation)
        # Every block keeps a layer that is modulated: nothing but what was foreseen goes away.
        share = fast.compiled.cost.modes[C] / fast.compiled.cost.plain_macs
        assert math.isclose(allocation.cost, share, **EXACT)
        costs.append(share)
    assert costs[0] <= 0.4 < costs[1] <= 0.7


def test_left_alone_sites_outside_of_branches_become_full(text_known: Known) -> None:
    options = text_known.options()
    dear, cheap = allocate(options, 1.0), allocate(options, 0.0)
    assert SiteRule("between", SiteMode.FULL) in dear.rules
    assert "between" not in dear.ranks
    assert dear.choices["between"] is FULL
    assert (cheap.choices["between"], cheap.ranks["between"]) == (LINEAR, 0)
    planned = [t for t in text_known.planned(cheap) if t.name == "between"]
    assert [t.rank for t in planned] == [0]
    assert "between" not in {t.name for t in text_known.planned(dear)}


# --- what is left out, as error of the output ---------------------------------------------------


def test_curves_begin_at_all_of_the_increment(known: Known) -> None:
    for target in known.survey.targets:
        curve, moments = known.survey.curve(target), known.survey.moments[target.name]
        weights = [known.captured.attribute(name).double() for name in target.weights]
        if moments.energy is not None:
            energy = float(moments.energy)
        elif moments.output is not None:
            energy = float(moments.output.double().trace())
        else:
            assert moments.input is not None
            stacked = torch.cat(weights)
            energy = float((stacked @ moments.input.double() @ stacked.T).trace())
        gain = known.survey.sensitivities[target.name]
        # Moments and spectra are float32.
        assert math.isclose(curve.errors[0], gain * target.tokens * energy, rel_tol=1e-5)
        assert curve.target == target


def test_curves_of_whole_branches_end_at_what_no_map_explains(known: Known) -> None:
    whole = [t for t in known.survey.targets if t.granularity is Granularity.BRANCH]
    assert len(whole) == len(known.sites.branches)
    for target in whole:
        curve, moments = known.survey.curve(target), known.survey.moments[target.name]
        factors = factors_of(known.captured, [target], {target.name: moments})[target.name]
        assert moments.input is not None
        assert moments.energy is not None
        # The share that the map of full rank does not keep, from the map itself.
        image = (factors.up @ factors.down).double()
        explained = float((image @ moments.input.double() @ image.T).trace())
        unexplained = float(moments.energy) - explained
        assert 0 < unexplained < float(moments.energy)
        gain = known.survey.sensitivities[target.name]
        # Widths are multiples of 8, so the last rank is full; factors are float32.
        slack = 1e-5 * curve.errors[0]
        expected = gain * target.tokens * unexplained
        assert math.isclose(curve.errors[-1], expected, rel_tol=0, abs_tol=slack)


# --- shares of steps ----------------------------------------------------------------------------

schedules = st.lists(st.sampled_from(StepMode), max_size=30).map(lambda rest: (R, *rest))
shares_of_modes = st.dictionaries(
    st.sampled_from([C, U, FORECAST]), st.tuples(st.floats(0, 2), st.floats(0, 0.5)), min_size=3
)


@settings(max_examples=100, deadline=None)
@given(schedule=schedules, known=shares_of_modes)
def test_run_share_is_the_mean_over_steps(
    schedule: tuple[StepMode, ...], known: dict[StepMode, tuple[float, float]]
) -> None:
    shares = StepShares(
        {m: s for m, (s, _) in known.items()}, {m: c for m, (_, c) in known.items()}
    )
    refresh = 1.0
    for mode in (C, U, FORECAST):
        if mode in schedule:
            refresh += known[mode][1]
    steps = [refresh if mode is R else known[mode][0] for mode in schedule]
    assert math.isclose(shares.run_share(schedule, 2), math.fsum(steps) / len(steps), **EXACT)


def test_run_of_refreshes_alone_costs_the_plain_run() -> None:
    assert StepShares({}, {}).run_share((R,) * 7, 2) == 1.0
    with pytest.raises(KeyError):  # a mode that was not measured
        StepShares({U: 0.1}, {U: 0.0}).run_share((R, C), 2)


def test_shares_in_macs_are_those_of_the_variants(known: Known) -> None:
    targets = known.planned(allocate(known.options(), 0.6))
    compiled = known.compiled(targets, C, U, fold=True)
    shares, variants = macs_shares(compiled), compiled.variant_set.variants
    macs = {mode: graph_macs(variant.module.graph) for mode, variant in variants.items()}
    assert shares.steps == {C: macs[C] / known.plain, U: macs[U] / known.plain, FORECAST: 0.0}
    folds = macs[R] - known.plain
    assert folds > 0
    schedule = (R, C, U, R, C, FORECAST, R)
    total = 3 * macs[R] + 2 * macs[C] + macs[U]
    assert math.isclose(shares.run_share(schedule, 2), total / (7 * known.plain), **EXACT)
    # Without a CALIBRATE step nothing is folded.
    total = 2 * known.plain + macs[U]
    share = shares.run_share((R, U, FORECAST, R), 2)
    assert math.isclose(share, total / (4 * known.plain), **EXACT)
    assert shares.run_share((R, FORECAST), 2) == 0.5


def test_nothing_is_folded_where_nothing_is_calibrated(known: Known) -> None:
    shares = macs_shares(known.compiled((), U))
    assert set(shares.steps) == {U, FORECAST}
    assert set(shares.caches.values()) == {0.0}


# --- what the additive model is worth -----------------------------------------------------------

TRAINED_STEPS = 12


def trained_run(model: nn.Module, seed: int, images: int = 4) -> Recording:
    noise = torch.randn(images, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    with record(model) as recording:
        GuidedDDIM(TRAINED_STEPS, 1.5, 10).sample(model, noise, torch.arange(images) + seed)
    return recording


@pytest.fixture(scope="module")
def trained() -> Known:
    """The sample's trained DiT along one run."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS).eval().requires_grad_(False)
    return learn(model, trained_run(model, 1))


@pytest.fixture(scope="module")
def other_run(trained: Known) -> list[tuple[list[Tensor], Tensor]]:
    """Tensors and output of every call of a run that nothing was learned from."""
    calls = [list(call.values()) for call in trained_run(trained.model, 2).runs[0]]
    with torch.no_grad():
        return [(call, trained.captured.module(*call)[0]) for call in calls]


def calibrate_error(
    known: Known,
    targets: Sequence[CalibrationTarget],
    run: Sequence[tuple[list[Tensor], Tensor]],
) -> tuple[int, float]:
    """MACs of a CALIBRATE step, and |e^ - e|^2 / |e|^2 over all of them along a run."""
    variant_set = known.variant_set(targets, C)
    kept: Kept = {}
    off = size = 0.0
    for step, (call, exact) in enumerate(run):
        mode = known.schedule[step]
        result, kept = run_step(variant_set, mode, kept, step, call)
        if mode is not R:
            off += float((result - exact).square().sum())
            size += float(exact.square().sum())
    return graph_macs(variant_set.variants[C].module.graph), off / size


# Over four pairs of runs: 0.42 to 0.52 of the uniform rank's error at 16, 0.62 to 0.71 at 96.
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "most"), [(16, 0.75), (96, 0.85)])
def test_water_filled_ranks_beat_the_uniform_rank_at_equal_macs(
    trained: Known, other_run: list[tuple[list[Tensor], Tensor]], rank: int, most: float
) -> None:
    uniform, _ = assign(trained.captured, trained.sites, rank=rank, joint=True)
    macs, error = calibrate_error(trained, uniform, other_run)
    allocation = allocate(trained.options(), macs / trained.plain)
    filled = trained.planned(allocation)
    filled_macs, filled_error = calibrate_error(trained, filled, other_run)
    assert filled_macs <= macs
    assert filled_error <= most * error, (
        f"squared error {filled_error:.3g} at {filled_macs / trained.plain:.3f} of a step, "
        f"uniform rank {rank}: {error:.3g} at {macs / trained.plain:.3f}"
    )


@pytest.mark.slow
def test_dearer_allocations_have_smaller_measured_errors(
    trained: Known, other_run: list[tuple[list[Tensor], Tensor]]
) -> None:
    pairs = []
    for level in (0.1, 0.45, 0.9):
        allocation = allocate(trained.options(), level)
        _, error = calibrate_error(trained, trained.planned(allocation), other_run)
        pairs.append((allocation.error, error))
    modelled, measured = zip(*pairs, strict=True)
    assert list(modelled) == sorted(modelled, reverse=True)
    assert list(measured) == sorted(measured, reverse=True), measured
