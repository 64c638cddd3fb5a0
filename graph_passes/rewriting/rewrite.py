"""From the plain graph to one variant per step mode, with the caches as inputs and outputs.

Linear layers whose output is cached are written over rows (T, channels), T being all tokens of
the batch: ONNX Runtime runs them as one GEMM that writes straight into the cache, where a
value taken after the reshape that follows the GEMM would be copied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.factors import Factors
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.graph.surgery import copy_graph, finish, graph_outputs, read_attribute
from calicache.graph_passes.graph.whole import WHOLE, is_whole
from calicache.graph_passes.rewriting.calibrate import Calibration, folded_value
from calicache.graph_passes.rewriting.insertion import (
    ANCHOR_WEIGHT,
    OUTPUT_WEIGHT,
    CacheSlot,
    CacheSource,
    Insertion,
    cached_form,
)
from calicache.graph_passes.rewriting.output_mix import mix_outputs, output_nodes
from calicache.graph_passes.rewriting.variants import (
    CacheSpec,
    Variant,
    VariantSet,
    table_columns,
)
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.schedule import Table
from calicache.graph_passes.sites.sites import Sites
from calicache.graph_passes.sites.targets import CalibrationTarget


@dataclass(frozen=True, slots=True)
class _Rewrite:
    """What all variants of one plan have in common; see `rewrite`."""

    captured: CapturedGraph
    sites: Sites
    targets: Sequence[CalibrationTarget]
    factors: Mapping[str, Factors]
    folded: frozenset[str]
    history: int
    outputs: Table | None
    latent: str | None
    run_values: Collection[str]

    @property
    def exits(self) -> list[str]:
        """The values that REUSE replaces."""
        return [name for branch in self.sites.branches for name in branch.exits]


def rewrite(
    captured: CapturedGraph,
    sites: Sites,
    targets: Sequence[CalibrationTarget],
    factors: Mapping[str, Factors],
    modes: Collection[StepMode],
    *,
    folded: frozenset[str] = frozenset(),
    anchors: Table = ((1.0,),),
    outputs: Table | None = None,
    latent: str | None = None,
    run_values: Collection[str] = (),
) -> VariantSet:
    """Make the variants for some modes.

    Args:
        captured: the plain graph; it is copied, not changed.
        sites: whose branches REUSE skips.
        targets: what CALIBRATE replaces, from `assign`.
        factors: by target name; needed where CALIBRATE is among the modes.
        modes: which variants a schedule uses; REFRESH is made in any case.
        folded: targets that cache A x instead of x, from `choose_folds`.
        anchors: weights of the kept refreshes by step (T, K).
        outputs: weights of a step's own output and the kept ones by step (T, 1 + K), and of
            the latent (T, 2 + K) where it is named; None leaves every output as it is.
        latent: the input that the last of these weights is for.
        run_values: nodes that cheap modes read instead of making them, from `find_run_values`.

    Raises:
        PlanError: an output is no floating-point tensor and cannot be forecast, or FORECAST is
            asked for without output weights.
    """
    if StepMode.FORECAST in modes and outputs is None:
        raise PlanError(
            "outputs",
            expected="output weights for FORECAST",
            got="None",
            fix="Pass output_table(schedule, order).",
        )
    history = len(anchors[0])
    plan = _Rewrite(captured, sites, targets, factors, folded, history, outputs, latent, run_values)
    cheap = _cheap_variants(plan, modes)
    slots = [slot for variant in cheap.values() for slot in variant.slots.values()]
    caches = _caches(plan, slots)
    variants = {StepMode.REFRESH: _refresh_variant(plan, caches), **cheap}
    read = {name for variant in variants.values() for name in variant.reads}
    anchor_columns = table_columns(ANCHOR_WEIGHT, anchors)
    columns = {**anchor_columns, **table_columns(OUTPUT_WEIGHT, outputs or ())}
    tables = {name: column for name, column in columns.items() if name in read}
    own = len(graph_outputs(captured.graph))
    return VariantSet(variants, caches, plan.history, tables, own)


def _cheap_variants(plan: _Rewrite, modes: Collection[StepMode]) -> dict[StepMode, Variant]:
    """The variants that read kept values, each that is asked for."""
    cheap: dict[StepMode, Variant] = {}
    if StepMode.CALIBRATE in modes:
        tapped = plan.exits if StepMode.REUSE in modes else []
        cheap[StepMode.CALIBRATE] = _calibrate_variant(plan, tapped)
    if StepMode.REUSE in modes:
        cheap[StepMode.REUSE] = _reuse_variant(plan)
    if StepMode.FORECAST in modes:
        cheap[StepMode.FORECAST] = _forecast_variant(plan)
    return cheap


def _caches(plan: _Rewrite, slots: Iterable[CacheSlot]) -> tuple[CacheSpec, ...]:
    """What is kept for later steps, in the order of the plain graph."""
    forms: dict[CacheSource, tuple[tuple[int, ...], torch.dtype]] = {}
    history: dict[CacheSource, int] = {}
    for slot in slots:
        forms[slot.source] = slot.shape, slot.dtype
        history[slot.source] = max(history.get(slot.source, 0), slot.back + 1)
    if plan.outputs is not None:  # REFRESH itself mixes its outputs with the kept ones
        for node in output_nodes(plan.captured):
            value = cached_form(node)
            source = CacheSource.of_output(node)
            forms[source] = tuple(value.shape), value.dtype
            history[source] = plan.history
    order = {node.name: number for number, node in enumerate(plan.captured.graph.nodes)}
    # Of one place the folded value comes first, and the model's output last.
    sources = sorted(forms, key=lambda s: (order[s.place], s.folded is None, s.is_output))
    return tuple(
        CacheSpec(
            source.name,
            source.node,
            source.folded,
            *forms[source],
            history[source],
            source.is_output,
        )
        for source in sources
    )


def _refresh_variant(plan: _Rewrite, caches: Sequence[CacheSpec]) -> Variant:
    """The plain graph with the cached values as further outputs; A x for folded ones."""
    graph, copies = copy_graph(plan.captured.graph)
    insert = Insertion(graph, plan.history)
    targets = {target.name: target for target in plan.targets}
    values: dict[str, fx.Node] = {}
    for cache in caches:
        value = copies[cache.node]
        if cache.folded is not None:
            factors = plan.factors[cache.folded]
            assert isinstance(factors, CalibrationFactors)
            value = folded_value(insert, plan.captured, copies, targets[cache.folded], factors)
        elif value.target is LINEAR:
            value = insert.linear_over_rows(value)
        values[cache.name] = value
    return _variant(plan, StepMode.REFRESH, insert, values)


def _calibrate_variant(plan: _Rewrite, tapped: Collection[str]) -> Variant:
    """Every target becomes y* + B A (x - x*), or y* + B (A x - z*) where folded.

    Branches in integers are y_ref + Q(W) Q(x - x_ref). Targets that share x share its increment,
    and its levels. At rank 0 a target is just y*. Linear layers in
    `tapped` that are no targets run over rows as in REFRESH, so that both read one weight
    layout.
    """
    graph, copies = copy_graph(plan.captured.graph)
    insert = Insertion(graph, plan.history)
    place = {node.name: number for number, node in enumerate(plan.captured.graph.nodes)}
    calibration = Calibration(insert, copies, plan.factors, plan.folded)
    # In graph order, so that a shared anchor is made before its first use.
    for target in sorted(plan.targets, key=lambda t: min(place[n] for n in t.nodes)):
        calibration.replace(target)
    for name in tapped:
        if name not in calibration.replaced and copies[name].target is LINEAR:
            insert.linear_over_rows(copies[name])
    _read_run_values(plan, insert, copies)
    values = {} if plan.outputs is None else _own_outputs(plan, insert)
    return _variant(plan, StepMode.CALIBRATE, insert, values)


def _own_outputs(plan: _Rewrite, insert: Insertion) -> dict[str, fx.Node]:
    """A step's own outputs as they are cached, by name of the cache; they are not mixed yet."""
    graph, order = insert.graph, list(plan.captured.graph.nodes)
    own = [value for value in graph_outputs(graph) if isinstance(value, fx.Node)]
    pairs = zip(output_nodes(plan.captured), own, strict=True)
    with graph.inserting_before(graph.output_node()):
        return {
            CacheSource.of_output(like).name: insert.rows(value) if like.target is LINEAR else value
            for like, value in sorted(pairs, key=lambda pair: order.index(pair[0]))
        }


def _reuse_variant(plan: _Rewrite) -> Variant:
    """Every branch becomes its anchor; what is inside goes away as dead code."""
    graph, copies = copy_graph(plan.captured.graph)
    insert = Insertion(graph, plan.history)
    for name in plan.exits:
        last = copies[name]
        with graph.inserting_before(last):
            last.replace_all_uses_with(insert.anchor(last))
    _read_run_values(plan, insert, copies)
    return _variant(plan, StepMode.REUSE, insert)


def _forecast_variant(plan: _Rewrite) -> Variant:
    """The model's outputs become weighted sums of the kept ones; nothing inside runs."""
    graph, _ = copy_graph(plan.captured.graph)
    return _variant(plan, StepMode.FORECAST, Insertion(graph, plan.history))


def _read_run_values(plan: _Rewrite, insert: Insertion, copies: Mapping[str, fx.Node]) -> None:
    for name in plan.run_values:
        node = copies[name]
        with insert.graph.inserting_before(node):
            node.replace_all_uses_with(insert.kept(node))


def _variant(
    plan: _Rewrite, mode: StepMode, insert: Insertion, caches: Mapping[str, fx.Node] | None = None
) -> Variant:
    """The finished graph: outputs mixed, dead code and unused placeholders gone."""
    graph, arguments = insert.graph, len(plan.captured.signature.tensors)
    values = graph_outputs(graph)
    if plan.outputs is not None:
        keep_own = mode is not StepMode.FORECAST
        values = mix_outputs(insert, plan.captured, plan.latent, keep_own=keep_own)
    graph.output_node().args = ((*values, *(caches or {}).values()),)
    finish(graph)
    _drop_unused(graph, arguments)
    live = {node.name for node in graph.nodes}
    # The target, not the name: fx renames a placeholder that a weight of the model is named like.
    reads = [str(node.target) for node in graph.nodes if node.op == "placeholder"][arguments:]
    return Variant(
        mode=mode,
        module=fx.GraphModule(
            _attributes(plan.captured, insert), graph, class_name=mode.name.capitalize()
        ),
        reads=tuple(reads),
        slots={name: insert.cache_slots[name] for name in reads if name in insert.cache_slots},
        inserted=tuple(node.name for node in insert.new_nodes if node.name in live),
        writes=tuple(caches or ()),
    )


def _attributes(
    captured: CapturedGraph, insert: Insertion
) -> dict[str, torch.Tensor | torch.nn.Module]:
    """What the nodes of a variant name: the model's own weights, the factors, a whole model."""
    nodes = list(insert.graph.nodes)
    names = {str(node.target) for node in nodes if node.op == "get_attr"}
    whole = {WHOLE} if any(map(is_whole, nodes)) else set()
    return {name: captured.module.get_submodule(name) for name in whole} | {
        name: insert.attributes[name]
        if name in insert.attributes
        else read_attribute(captured.module, name)
        for name in sorted(names)
    }


def _drop_unused(graph: fx.Graph, arguments: int) -> None:
    for node in [n for n in graph.nodes if n.op == "placeholder"][arguments:]:
        if not node.users:
            graph.erase_node(node)
