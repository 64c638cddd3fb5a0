"""The graphs that the rewrite emits: structure, names, arguments, meta data."""

from __future__ import annotations

import copy
from collections.abc import Collection

import pytest
import torch
import torch.nn.functional as F
from model import FashionDiT, FashionDiTConfig
from support.analyses import analysis_of, noise_analysis, targets_of
from support.factors import factors_of
from support.golden import assert_golden, graph_text
from support.models import Branch, relative, sample_dit, shake
from torch import Tensor, fx, nn

from calicache.graph_passes import (
    Plan,
    Recording,
    StepMode,
    optimize,
    record,
)
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.recording.recorder import Recorder
from calicache.graph_passes.rewriting.checks import verify_variants
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import CacheSpec, VariantSet
from calicache.graph_passes.settings.schedule import anchor_table, output_table
from calicache.graph_passes.sites.analysis import Analysis

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode
CHEAP = (REFRESH, CALIBRATE, REUSE)
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def emit(
    analysis: Analysis,
    folded: Collection[str] = (),
    rank: int = 2,
    modes: Collection[StepMode] = CHEAP,
) -> VariantSet:
    captured, sites = analysis.captured, analysis.sites
    targets = targets_of(analysis, rank)
    factors = factors_of(captured, targets, {})
    variant_set = rewrite(captured, sites, targets, factors, modes, folded=frozenset(folded))
    return verify_variants(captured, variant_set)


def graph(variant_set: VariantSet, mode: StepMode) -> fx.Graph:
    return variant_set.variants[mode].module.graph


def weights(source: fx.Graph) -> set[str]:
    """Names of the tensors that a graph reads."""
    return {str(node.target) for node in source.nodes if node.op == "get_attr"}


def count(source: fx.Graph, target: object) -> int:
    return sum(node.target == target for node in source.nodes)


class Chain(Branch):
    def branch(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Twice(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        return self.first(F.gelu(self.first(x)))


@pytest.fixture(scope="module")
def variant_set(dit_analysis: Analysis) -> VariantSet:
    return emit(dit_analysis)


def test_calibrate_replaces_every_site_and_keeps_attention(
    dit_analysis: Analysis, variant_set: VariantSet
) -> None:
    captured, sites = dit_analysis.captured, dit_analysis.sites
    cheap = graph(variant_set, CALIBRATE)
    replaced = {site.weight for site in sites.linears} | {site.bias for site in sites.linears}
    factors = weights(cheap) - weights(captured.graph)
    assert weights(cheap) - factors == weights(captured.graph) - replaced
    assert len(factors) == 2 * len(sites.linears)
    assert count(cheap, ATTENTION) == count(captured.graph, ATTENTION) == 2


def test_reuse_drops_whole_branches(dit_analysis: Analysis, variant_set: VariantSet) -> None:
    cheap, sites = graph(variant_set, REUSE), dit_analysis.sites
    assert count(cheap, ATTENTION) == 0
    assert not [name for name in weights(cheap) if name.startswith("blocks.")]
    left = {node.name for node in cheap.nodes}
    assert not left & {name for branch in sites.branches for name in branch.nodes}
    assert {name for branch in sites.branches for name in branch.joins} <= left


def test_rank_zero_drops_what_only_sites_needed(dit_analysis: Analysis) -> None:
    cheap = emit(dit_analysis, rank=0, modes={CALIBRATE})
    # The output projection of attention returns its cache, so nobody asks for q, k and v.
    assert count(graph(cheap, CALIBRATE), ATTENTION) == 0
    kept = {cache.node for cache in cheap.caches}
    assert kept == {
        s.node for s in dit_analysis.sites.linears if s.name.endswith((".proj", ".fc2"))
    }


def test_caches_are_named_shaped_and_ordered_by_the_graph() -> None:
    caches = emit(noise_analysis(Branch()), ["second"]).caches
    single = torch.float32
    assert caches == (
        CacheSpec("cache_layer_norm", "layer_norm", None, (2, 5, 8), single),
        CacheSpec("cache_linear_1", "linear_1", None, (10, 16), single),
        CacheSpec("cache_linear_2_down", "gelu", "second", (10, 2), single),
        CacheSpec("cache_linear_2", "linear_2", None, (10, 8), single),
    )


@pytest.mark.parametrize("fold", [False, True])
def test_caches_are_inputs_of_cheap_variants_and_outputs_of_refresh(
    dit_analysis: Analysis, fold: bool
) -> None:
    captured, sites = dit_analysis.captured, dit_analysis.sites
    variants = emit(dit_analysis, [s.name for s in sites.linears] if fold else [])
    names = [cache.name for cache in variants.caches]
    arguments = [node.name for node in captured.graph.nodes if node.op == "placeholder"]
    read: set[str] = set()
    for mode, variant in variants.variants.items():
        inputs = [node.name for node in variant.module.graph.nodes if node.op == "placeholder"]
        assert inputs == [*arguments, *variant.reads]
        assert list(variant.reads) == [name for name in names if name in variant.reads]
        assert len(graph(variants, mode).output_node().args[0]) == 1 + len(names) * (mode == 0)
        read |= set(variant.reads)
    assert read == set(names)  # nothing is kept that nobody reads
    outputs = variants.variants[REFRESH].module.graph.output_node().args[0][1:]
    for cache, value in zip(variants.caches, outputs, strict=True):
        assert (cache.shape, cache.dtype) == (value.meta["val"].shape, value.meta["val"].dtype)


def test_schedule_without_cheap_steps_keeps_nothing(dit_analysis: Analysis) -> None:
    plain = emit(dit_analysis, modes={REFRESH})
    assert (set(plain.variants), plain.caches) == ({REFRESH}, ())
    assert str(graph(plain, REFRESH)) == str(dit_analysis.captured.graph)


def test_rewriting_leaves_the_source_and_repeats_itself(dit_analysis: Analysis) -> None:
    captured, sites = dit_analysis.captured, dit_analysis.sites
    before = str(captured.graph)
    folded = sites.groups[0].sites
    first, second = emit(dit_analysis, folded), emit(dit_analysis, folded)
    assert str(captured.graph) == before
    assert first.caches == second.caches
    for mode in CHEAP:
        assert graph_text(graph(first, mode)) == graph_text(graph(second, mode))
        assert first.variants[mode].reads == second.variants[mode].reads


@pytest.mark.parametrize("order", [1, 2])
def test_every_kept_refresh_has_a_slot_and_a_weight(dit_analysis: Analysis, order: int) -> None:
    captured, sites = dit_analysis.captured, dit_analysis.sites
    schedule = (REFRESH, CALIBRATE, REFRESH, REUSE, REFRESH, CALIBRATE, FORECAST)
    targets = targets_of(dit_analysis, 2)
    variant_set = rewrite(
        captured,
        sites,
        targets,
        factors_of(captured, targets, {}),
        set(schedule),
        anchors=anchor_table(schedule, order),
        outputs=output_table(schedule, order),
    )
    verify_variants(captured, variant_set)
    assert variant_set.history == order + 1
    slots = {cache.name for cache in variant_set.caches}
    slots |= {
        f"{cache.name}_back{back}" for cache in variant_set.caches for back in range(1, order + 1)
    }
    assert set(variant_set.slots()) == slots
    anchors = {f"anchor_weight_{k}" for k in range(order + 1)}
    outputs = {f"output_weight_{k}" for k in range(order + 2)}
    assert set(variant_set.tables) == anchors | outputs
    assert variant_set.tables["anchor_weight_0"] == tuple(
        r[0] for r in anchor_table(schedule, order)
    )
    reads = {mode: set(variant.reads) for mode, variant in variant_set.variants.items()}
    assert reads[REFRESH] & anchors == reads[FORECAST] & anchors == set()
    assert reads[REFRESH] >= outputs
    assert reads[FORECAST] >= outputs - {"output_weight_0"}
    assert set().union(*reads.values()) == slots | anchors | outputs  # nothing unread is kept


def test_read_finds_weights_and_slots_by_step(dit_analysis: Analysis) -> None:
    captured, sites = dit_analysis.captured, dit_analysis.sites
    schedule = (REFRESH, REUSE, REFRESH, REUSE)
    variant_set = rewrite(captured, sites, (), {}, set(schedule), anchors=anchor_table(schedule, 1))
    name = variant_set.caches[0].name
    reads = [name, f"{name}_back1", "anchor_weight_1"]
    cpu = torch.device("cpu")
    old, new = torch.ones(1), torch.full((1,), 2.0)
    weights = variant_set.weights_of(3)
    assert weights == variant_set.named_weights((1.5, -0.5), None)
    assert variant_set.read(reads, {name: (new, old)}, weights, cpu) == [2.0, 1.0, -0.5]
    # What is missing has no weight.
    weights = variant_set.weights_of(1)
    assert variant_set.read(reads, {name: (old,)}, weights, cpu) == [1.0, 1.0, 0.0]
    empty, *_ = variant_set.read(reads, {}, variant_set.weights_of(0), cpu)
    assert (empty.shape, int(empty.count_nonzero())) == (variant_set.caches[0].shape, 0)


def test_forecast_needs_no_other_cache_than_the_output(dit_analysis: Analysis) -> None:
    captured, sites = dit_analysis.captured, dit_analysis.sites
    schedule = (REFRESH, REFRESH, FORECAST)
    variant_set = rewrite(
        captured,
        sites,
        targets_of(dit_analysis, 2),
        {},
        set(schedule),
        anchors=anchor_table(schedule, 2),
        outputs=output_table(schedule, 2),
    )
    verify_variants(captured, variant_set)
    assert set(variant_set.variants) == {REFRESH, FORECAST}
    (cache,) = variant_set.caches
    assert cache.shape == (4, 1, 28, 28)
    assert weights(graph(variant_set, FORECAST)) == set()


@pytest.mark.slow
def test_excluded_sites_stay_full(dit: FashionDiT, dit_recording: Recording) -> None:
    part = analysis_of(dit, dit_recording, exclude=["*.mlp.fc?", "*.k"])
    variants = emit(part)
    cheap = weights(graph(variants, CALIBRATE))
    assert {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("mlp.fc1", "attn.k")} < cheap
    assert "blocks.0.attn.q.weight" not in cheap
    # No site in them: the MLP branches run in full on REUSE as well.
    assert len(variants.variants[REUSE].reads) == 2
    assert "blocks.1.mlp.fc1.weight" in weights(graph(variants, REUSE))


def run(variant_set: VariantSet, mode: StepMode, first: Tensor, second: Tensor) -> Tensor:
    """REFRESH on one input, then a cheap step on another."""
    kept = variant_set.variants[REFRESH].module(first)[variant_set.outputs :]
    caches = dict(zip([cache.name for cache in variant_set.caches], kept, strict=True))
    variant = variant_set.variants[mode]
    return variant.module(second, *(caches[name] for name in variant.reads))[0]


@pytest.mark.parametrize("fold", [False, True])
def test_both_layers_of_a_chain_are_calibrated(fold: bool) -> None:
    model = Chain()
    analysis = noise_analysis(model)
    variants = emit(analysis, ["first", "second"] if fold else [])
    assert not {"first.weight", "second.weight"} & weights(graph(variants, CALIBRATE))
    # Each layer once on REFRESH: embed, first, second, and two A x where folded.
    assert count(graph(variants, REFRESH), LINEAR) == (5 if fold else 3)
    factors = factors_of(analysis.captured, targets_of(analysis, 2), {})
    first, second = torch.randn(2, 2, 5, 8)
    x, x_ref = model.norm(model.embed(second)), model.norm(model.embed(first))
    low = [factors[name].up @ factors[name].down for name in ("first", "second")]
    y_ref = model.first(x_ref)
    y = y_ref + (x - x_ref) @ low[0].T
    expected = model.embed(second) + model.second(y_ref) + (y - y_ref) @ low[1].T
    # float32 sums in another order.
    torch.testing.assert_close(
        run(variants, CALIBRATE, first, second), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("fold", [False, True])
def test_branch_that_ends_in_a_site_has_one_cache_for_both_modes(fold: bool) -> None:
    model = Branch()
    analysis = noise_analysis(model)
    variants = emit(analysis, ["first", "second"] if fold else [])
    (branch,) = analysis.sites.branches
    assert branch.exits == (analysis.sites.linears[-1].node,) == ("linear_2",)
    assert variants.variants[REUSE].reads == ("cache_linear_2",)
    assert variants.variants[CALIBRATE].reads[-1] == "cache_linear_2"
    first, second = torch.randn(2, 2, 5, 8)
    expected = model.embed(second) + model.branch(model.norm(model.embed(first)))
    # The same layers on rows instead of batches: float32 rounding of sums over 16 terms.
    torch.testing.assert_close(run(variants, REUSE, first, second), expected, rtol=1e-5, atol=1e-6)
    same = run(variants, CALIBRATE, first, first)  # no increment: the cached values themselves
    torch.testing.assert_close(same, model(first), rtol=1e-5, atol=1e-6)


def test_layer_called_twice_is_two_sites() -> None:
    analysis = noise_analysis(Twice())
    assert [site.name for site in analysis.sites.linears] == ["first", "first@1"]
    variants = emit(analysis)
    assert "first.weight" not in weights(graph(variants, CALIBRATE))
    first = torch.randn(2, 5, 8)
    # No increment: float32 rounding alone.
    expected = analysis.captured.module(first)[0]
    torch.testing.assert_close(
        run(variants, CALIBRATE, first, first), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fold", [False, True])
def test_half_precision_model_keeps_its_dtype(
    dit: FashionDiT, dit_recording: Recording, dtype: torch.dtype, fold: bool
) -> None:
    half, recording = copy.deepcopy(dit).to(dtype), Recorder()
    for call in dit_recording.calls[:2]:
        recording.append(half, (), {**call, "hidden_states": call["hidden_states"].to(dtype)})
    analysis = analysis_of(half, recording)
    variants = emit(analysis, [s.name for s in analysis.sites.linears] if fold else [], rank=32)
    assert {cache.dtype for cache in variants.caches} == {dtype}
    first, second = (list(call.values()) for call in recording.calls)
    outputs = variants.variants[REFRESH].module(*first)
    assert {value.dtype for value in outputs} == {dtype}
    caches = dict(zip([cache.name for cache in variants.caches], outputs[1:], strict=True))
    variant = variants.variants[CALIBRATE]
    got = variant.module(*second, *(caches[name] for name in variant.reads))[0]
    assert got.dtype == dtype
    # Full rank is the model itself, up to its own rounding: 2^-9 for bfloat16, a few times over.
    exact = dit(**dit_recording.calls[1])
    assert relative(got.float(), exact) < 16 * torch.finfo(dtype).eps


@pytest.fixture(scope="module")
def one_block() -> VariantSet:
    """One block of width 8, as small as it gets, with some sites folded."""
    model = FashionDiT(FashionDiTConfig(width=8, depth=1, heads=2, frequency_channels=8))
    with record(shake(model)) as recording:
        sample_dit(model, batch=1, steps=2)
    return emit(analysis_of(model, recording), ["blocks.0.attn.proj", "blocks.0.mlp.fc1"])


@pytest.fixture(scope="module")
def forecast_block() -> VariantSet:
    """The same block under a plan of order 2 with joint siblings, and a forecast at its end."""
    model = FashionDiT(FashionDiTConfig(width=8, depth=1, heads=2, frequency_channels=8))
    with record(shake(model)) as recording:
        sample_dit(model, batch=1, steps=6)
    schedule = (REFRESH, CALIBRATE, REFRESH, CALIBRATE, REFRESH, FORECAST)
    plan = Plan.from_trajectory(model, recording, schedule=schedule, rank=2, order=2, correct=False)
    return optimize(model, plan).compiled.variant_set


@pytest.mark.slow
@pytest.mark.parametrize("mode", CHEAP, ids=lambda mode: mode.name.lower())
def test_graph_is_the_golden_one(one_block: VariantSet, mode: StepMode) -> None:
    assert_golden(f"rewriting/{mode.name.lower()}.txt", graph_text(graph(one_block, mode)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [CALIBRATE, FORECAST], ids=lambda mode: mode.name.lower())
def test_graph_of_order_2_is_the_golden_one(forecast_block: VariantSet, mode: StepMode) -> None:
    text = graph_text(graph(forecast_block, mode))
    assert_golden(f"rewriting/{mode.name.lower()}_order_2.txt", text)
