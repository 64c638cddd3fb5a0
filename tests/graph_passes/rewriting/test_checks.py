"""Every invariant, broken by hand: the error names the place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from model import FashionDiT
from torch import fx, nn

from calicache.graph_passes import (
    CapturedGraph,
    OptimizedModel,
    Plan,
    Recording,
    StepMode,
    optimize,
)
from calicache.graph_passes.common.errors import VerifyError
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.graph.checks import verify_captured, verify_functional
from calicache.graph_passes.rewriting.checks import verify_variants
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode
aten = torch.ops.aten


@pytest.fixture
def captured(dit: FashionDiT, dit_recording: Recording) -> CapturedGraph:
    return capture(dit, dit_recording.signature)


@pytest.fixture(scope="module")
def fast(dit: FashionDiT, dit_plan: Plan) -> OptimizedModel:
    return optimize(dit, dit_plan.with_schedule(tuple(StepMode)))


@pytest.fixture(scope="module")
def fast_forecast(dit: FashionDiT, forecast_plan: Plan) -> OptimizedModel:
    return optimize(dit, forecast_plan)


@pytest.fixture
def graph_and_variants(fast: OptimizedModel) -> tuple[CapturedGraph, VariantSet]:
    """Variants of its own for every test to break."""
    folded = frozenset(cache.folded for cache in fast.compiled.variant_set.caches if cache.folded)
    return fast.compiled.captured, rewrite(
        fast.compiled.captured,
        fast.compiled.analysis.sites,
        fast.compiled.targets,
        fast.compiled.factors,
        set(StepMode),
        folded=folded,
        outputs=fast.plan.recipe.outputs,
    )


def refuses(check: Callable[[], object], where: str) -> None:
    with pytest.raises(VerifyError) as raised:
        check()
    assert where in str(raised.value)
    assert "defect of calicache" in raised.value.fix


def named(graph: fx.Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name == name)


@pytest.mark.slow
def test_good_graphs_are_handed_on(graph_and_variants: tuple[CapturedGraph, VariantSet]) -> None:
    captured, variant_set = graph_and_variants
    assert verify_captured(captured) is captured
    assert verify_variants(captured, variant_set) is variant_set


def test_graphs_with_a_history_are_good(fast_forecast: OptimizedModel) -> None:
    variant_set = fast_forecast.compiled.variant_set
    assert (variant_set.history, set(variant_set.variants)) == (3, set(StepMode))
    assert verify_variants(fast_forecast.compiled.captured, variant_set) is variant_set


@pytest.mark.slow
def test_graph_of_diffusers_is_good(
    diffusers_dit: nn.Module, diffusers_recording: Recording
) -> None:
    captured = capture(diffusers_dit, diffusers_recording.signature)
    assert verify_captured(captured) is captured


# --- the captured graph -----------------------------------------------------------------------


@pytest.mark.slow
def test_op_that_writes_to_its_input_is_refused(captured: CapturedGraph) -> None:
    captured.node("add_3").target = aten.add_.Tensor
    refuses(lambda: verify_captured(captured), "add_3")


@pytest.mark.slow
def test_op_with_an_out_argument_is_refused(captured: CapturedGraph) -> None:
    captured.node("silu_1").target = aten.silu.out
    refuses(lambda: verify_captured(captured), "silu_1")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["call_method", "call_module"])
def test_node_that_calls_no_function_is_refused(captured: CapturedGraph, op: str) -> None:
    captured.module.add_module("extra", nn.Identity())
    first = captured.node("silu")
    with captured.graph.inserting_after(first):
        target = "contiguous" if op == "call_method" else "extra"
        new = captured.graph.create_node(op, target, (first,))
    new.meta["val"] = first.meta["val"]
    refuses(lambda: verify_captured(captured), new.name)


@pytest.mark.slow
def test_value_without_a_shape_is_refused(captured: CapturedGraph) -> None:
    del captured.node("linear_4").meta["val"]
    refuses(lambda: verify_captured(captured), "linear_4")


@pytest.mark.slow
def test_node_used_before_it_is_made_is_refused(captured: CapturedGraph) -> None:
    captured.node("add_3").append(captured.node("mul_1"))
    refuses(lambda: verify_captured(captured), "mul_1")


@pytest.mark.slow
def test_input_of_another_shape_than_the_signature_is_refused(captured: CapturedGraph) -> None:
    node = captured.node("hidden_states")
    node.meta["val"] = node.meta["val"].new_empty(3, 1, 28, 28)
    refuses(lambda: verify_captured(captured), "placeholders")


def test_plain_function_is_allowed() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    graph.output((y,))
    x.meta["val"] = y.meta["val"] = torch.zeros(2)
    assert verify_functional(graph) is None
    del y.meta["val"]
    refuses(lambda: verify_functional(graph), "relu")


# --- the variants -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", StepMode)
def test_variant_that_returns_too_little_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet], mode: StepMode
) -> None:
    captured, variant_set = graph_and_variants
    output = variant_set.variants[mode].module.graph.output_node()
    output.args = (output.args[0][:-1],)
    refuses(lambda: verify_variants(captured, variant_set), f"outputs of {mode.name}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [CALIBRATE, REUSE, FORECAST])
def test_cheap_variant_that_returns_a_cache_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet], mode: StepMode
) -> None:
    captured, variant_set = graph_and_variants
    variant = variant_set.variants[mode]
    output = variant.module.graph.output_node()
    output.args = ((*output.args[0], named(variant.module.graph, variant.reads[0])),)
    refuses(lambda: verify_variants(captured, variant_set), f"outputs of {mode.name}")


def test_variant_with_a_result_of_another_shape_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet],
) -> None:
    captured, variant_set = graph_and_variants
    result = variant_set.variants[REUSE].module.graph.output_node().args[0][0]
    result.meta["val"] = result.meta["val"].new_empty(4, 1, 28, 27)
    refuses(lambda: verify_variants(captured, variant_set), "outputs of REUSE")


def with_variant(variant_set: VariantSet, mode: StepMode, **changes: object) -> VariantSet:
    variant = dataclasses.replace(variant_set.variants[mode], **changes)
    return dataclasses.replace(variant_set, variants={**variant_set.variants, mode: variant})


def test_reads_in_another_order_are_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet],
) -> None:
    captured, variant_set = graph_and_variants
    reads = variant_set.variants[CALIBRATE].reads
    wrong = with_variant(variant_set, CALIBRATE, reads=reads[::-1])
    refuses(lambda: verify_variants(captured, wrong), "placeholders of CALIBRATE")


def test_refresh_that_reads_a_cache_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet],
) -> None:
    captured, variant_set = graph_and_variants
    reuse = variant_set.variants[REUSE]
    wrong = with_variant(variant_set, REFRESH, module=reuse.module, reads=reuse.reads)
    refuses(lambda: verify_variants(captured, wrong), "cache_")


def test_cache_that_refresh_does_not_write_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet],
) -> None:
    captured, variant_set = graph_and_variants
    gone = variant_set.variants[CALIBRATE].reads[3]
    kept = tuple(cache for cache in variant_set.caches if cache.name != gone)
    output = variant_set.variants[REFRESH].module.graph.output_node()
    at = 1 + [cache.name for cache in variant_set.caches].index(gone)
    output.args = (tuple(value for i, value in enumerate(output.args[0]) if i != at),)
    wrong = dataclasses.replace(variant_set, caches=kept)
    refuses(lambda: verify_variants(captured, wrong), gone)


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_cache_of_another_form_than_written_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet], change: str
) -> None:
    captured, variant_set = graph_and_variants
    variant = variant_set.variants[CALIBRATE]
    node = named(variant.module.graph, variant.reads[1])
    value = node.meta["val"]
    node.meta["val"] = value[:1] if change == "shape" else value.half()
    refuses(lambda: verify_variants(captured, variant_set), variant.reads[1])


def test_refresh_that_writes_another_dtype_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet],
) -> None:
    captured, variant_set = graph_and_variants
    value = variant_set.variants[REFRESH].module.graph.output_node().args[0][1]
    value.meta["val"] = value.meta["val"].half()
    refuses(lambda: verify_variants(captured, variant_set), "outputs of REFRESH")


@pytest.mark.parametrize("mode", [REFRESH, CALIBRATE, REUSE])  # FORECAST reads no weight
def test_weight_of_another_shape_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet], mode: StepMode
) -> None:
    captured, variant_set = graph_and_variants
    node = next(n for n in variant_set.variants[mode].module.graph.nodes if n.op == "get_attr")
    node.meta["val"] = node.meta["val"].new_empty(5, 5)
    refuses(lambda: verify_variants(captured, variant_set), node.name)


def test_weight_that_is_not_there_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet],
) -> None:
    captured, variant_set = graph_and_variants
    module = variant_set.variants[REUSE].module
    del module.final_proj.weight
    refuses(lambda: verify_variants(captured, variant_set), "final_proj_weight")


@pytest.mark.parametrize("mode", StepMode)
def test_weight_that_no_table_holds_is_refused(
    fast_forecast: OptimizedModel, mode: StepMode
) -> None:
    captured, variant_set = fast_forecast.compiled.captured, fast_forecast.compiled.variant_set
    name = next(read for read in variant_set.variants[mode].reads if read in variant_set.tables)
    tables = {key: table for key, table in variant_set.tables.items() if key != name}
    refuses(
        lambda: verify_variants(captured, dataclasses.replace(variant_set, tables=tables)), name
    )


def test_slot_that_is_not_kept_is_refused(fast_forecast: OptimizedModel) -> None:
    captured, variant_set = fast_forecast.compiled.captured, fast_forecast.compiled.variant_set
    wrong = dataclasses.replace(variant_set, history=2)
    refuses(lambda: verify_variants(captured, wrong), "_back2")


def test_weight_that_is_no_single_number_is_refused(
    graph_and_variants: tuple[CapturedGraph, VariantSet],
) -> None:
    captured, variant_set = graph_and_variants
    node = named(variant_set.variants[FORECAST].module.graph, "output_weight_1")
    node.meta["val"] = torch.zeros(1, device="meta")
    refuses(lambda: verify_variants(captured, variant_set), "output_weight_1")
