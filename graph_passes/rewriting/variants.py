"""From the plain graph to one variant per step mode, with the caches as inputs and outputs.

Linear layers whose output is cached are written over rows (T, channels), T being all tokens of
the batch: ONNX Runtime runs them as one GEMM that writes straight into the cache, where a
value taken after the reshape that follows the GEMM would be copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.graph.surgery import copy_graph, finish, graph_outputs, read_attribute
from calicache.graph_passes.rewriting.calibrate import Calibration, folded_name, folded_value
from calicache.graph_passes.rewriting.insertion import (
    ANCHOR_WEIGHT,
    OUTPUT_WEIGHT,
    Insertion,
    cache_name,
    cached_form,
    slot_name,
    weight_name,
)
from calicache.graph_passes.rewriting.output_mix import mix_outputs, output_nodes
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.schedule import Table
from calicache.graph_passes.sites.sites import Sites
from calicache.graph_passes.sites.targets import CalibrationTarget


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One value that a REFRESH step keeps for the steps after it.

    Attributes:
        name: of the placeholder that takes its newest value, such as `cache_linear_4`.
        node: whose value it is in the plain graph; x for a folded cache, which is A x.
        folded: the target whose A is applied, or None.
        shape, dtype: of the cached value.
        history: how many refreshes of it are kept.
    """

    name: str
    node: str
    folded: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    history: int = 1

    @property
    def nbytes(self) -> int:
        """Size of one kept refresh in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Variant:
    """The graph of one mode.

    Attributes:
        mode: what the step does.
        module: takes the model's tensors, then what `reads` names; returns the model's flat
            outputs, then (REFRESH alone) all caches.
        reads: cache slots and weights of the step, in the order of the placeholders.
        inserted: names of the nodes that the plain graph does not have.
    """

    mode: StepMode
    module: fx.GraphModule
    reads: tuple[str, ...]
    inserted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VariantSet:
    """All variants of one model and the caches they share.

    Attributes:
        variants: by mode; REFRESH is always there.
        caches: in the order of REFRESH's extra outputs.
        history: the most refreshes that are kept of any cache.
        tables: the weights that the variants read, by name, each one number a step.
        outputs: how many flat outputs the model itself has.
    """

    variants: Mapping[StepMode, Variant]
    caches: tuple[CacheSpec, ...]
    history: int
    tables: Mapping[str, tuple[float, ...]]
    outputs: int

    def slots(self) -> dict[str, tuple[CacheSpec, int]]:
        """Every kept value by name: its cache, and how many refreshes back it is."""
        return {
            slot_name(cache.name, back): (cache, back)
            for back in range(self.history)
            for cache in self.caches
            if back < cache.history
        }

    def scheduled(self, anchors: Table) -> VariantSet:
        """The same variants with the anchor weights of another schedule (T, K or fewer)."""
        missing = (0.0,) * (self.history - len(anchors[0]))
        padded = tuple((*row, *missing) for row in anchors)
        fresh = _columns(ANCHOR_WEIGHT, padded)
        tables = {name: fresh.get(name, table) for name, table in self.tables.items()}
        return replace(self, tables=tables)

    def read(
        self,
        reads: Sequence[str],
        kept: Sequence[Mapping[str, Tensor]],
        step: int,
        device: torch.device,
    ) -> list[Tensor]:
        """What a variant reads at a step: weights from tables, and values of kept refreshes.

        A refresh that has not been yet has weight 0; the newest one (or zeros) stands for it.

        Args:
            reads: names, in order.
            kept: cache values by cache name, newest refresh first.
            step: index in the run.
            device: of the tensors that are made here.
        """
        slots = self.slots()
        values = []
        for name in reads:
            if name in self.tables:
                values.append(torch.tensor(self.tables[name][step], device=device))
                continue
            cache, back = slots[name]
            if kept:
                values.append(kept[back if back < len(kept) else 0][cache.name])
            else:
                values.append(torch.zeros(cache.shape, dtype=cache.dtype, device=device))
        return values


def rewrite(
    captured: CapturedGraph,
    sites: Sites,
    targets: Sequence[CalibrationTarget],
    factors: Mapping[str, CalibrationFactors],
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
    used = frozenset(modes) | {StepMode.REFRESH}
    if StepMode.FORECAST in used and outputs is None:
        raise PlanError(
            "outputs",
            expected="output weights for FORECAST",
            got="None",
            fix="Pass output_table(schedule, order).",
        )
    history = len(anchors[0])
    build = _Builder(
        captured, sites, targets, factors, folded, history, outputs, latent, run_values
    )
    variants: dict[StepMode, Variant] = {}
    if StepMode.CALIBRATE in used:
        exits = [name for branch in sites.branches for name in branch.exits]
        tapped = exits if StepMode.REUSE in used else []
        variants[StepMode.CALIBRATE] = build.calibrate(tapped)
    if StepMode.REUSE in used:
        variants[StepMode.REUSE] = build.reuse()
    if StepMode.FORECAST in used:
        variants[StepMode.FORECAST] = build.forecast()
    caches = build.caches(variants.values())
    variants = {StepMode.REFRESH: build.refresh(caches), **variants}
    read = {name for variant in variants.values() for name in variant.reads}
    tables = {**_columns(ANCHOR_WEIGHT, anchors), **_columns(OUTPUT_WEIGHT, outputs or ())}
    return VariantSet(
        variants,
        caches,
        history,
        {name: table for name, table in tables.items() if name in read},
        len(graph_outputs(captured.graph)),
    )


def _columns(name: str, table: Table) -> dict[str, tuple[float, ...]]:
    return {weight_name(name, k): column for k, column in enumerate(zip(*table, strict=True))}


@dataclass(frozen=True, slots=True)
class _Builder:
    """What all variants of one plan have in common."""

    captured: CapturedGraph
    sites: Sites
    targets: Sequence[CalibrationTarget]
    factors: Mapping[str, CalibrationFactors]
    folded: frozenset[str]
    history: int
    outputs: Table | None
    latent: str | None
    run_values: Collection[str]

    def refresh(self, caches: tuple[CacheSpec, ...]) -> Variant:
        """The plain graph with the cached values as further outputs; A x for folded ones."""
        graph, copies = copy_graph(self.captured.graph)
        insert = Insertion(graph, self.history)
        values = []
        for cache in caches:
            value = copies[cache.node]
            if cache.folded is not None:
                target = self._target(cache.folded)
                value = folded_value(
                    insert, self.captured, copies, target, self.factors[target.name]
                )
            elif value.target is LINEAR:
                value = insert.linear_over_rows(value)
            values.append(value)
        return self._finish(StepMode.REFRESH, insert, values)

    def _target(self, name: str) -> CalibrationTarget:
        return next(target for target in self.targets if target.name == name)

    def calibrate(self, tapped: Collection[str] = ()) -> Variant:
        """Every target becomes y* + B A (x - x*), or y* + B (A x - z*) where folded.

        Targets that share x share x - x*. At rank 0 a target is just y*. Linear layers in
        `tapped` that are no targets run over rows as in REFRESH, so that both read one weight
        layout.
        """
        graph, copies = copy_graph(self.captured.graph)
        insert = Insertion(graph, self.history)
        place = {node.name: number for number, node in enumerate(self.captured.graph.nodes)}
        calibrate = Calibration(insert, copies, self.factors, self.folded)
        # In graph order, so that a shared anchor is made before its first use.
        for target in sorted(self.targets, key=lambda t: min(place[n] for n in t.nodes)):
            calibrate.replace(target)
        for name in tapped:
            if name not in calibrate.replaced and copies[name].target is LINEAR:
                insert.linear_over_rows(copies[name])
        self._read_run_values(insert, copies)
        return self._finish(StepMode.CALIBRATE, insert)

    def reuse(self) -> Variant:
        """Every branch becomes its anchor; what is inside goes away as dead code."""
        graph, copies = copy_graph(self.captured.graph)
        insert = Insertion(graph, self.history)
        for name in (name for branch in self.sites.branches for name in branch.exits):
            last = copies[name]
            with graph.inserting_before(last):
                last.replace_all_uses_with(insert.anchor(last))
        self._read_run_values(insert, copies)
        return self._finish(StepMode.REUSE, insert)

    def forecast(self) -> Variant:
        """The model's outputs become weighted sums of the kept ones; nothing inside runs."""
        graph, _ = copy_graph(self.captured.graph)
        return self._finish(StepMode.FORECAST, Insertion(graph, self.history))

    def _read_run_values(self, insert: Insertion, copies: Mapping[str, fx.Node]) -> None:
        for name in self.run_values:
            node = copies[name]
            with insert.graph.inserting_before(node):
                node.replace_all_uses_with(insert.kept(node))

    def caches(self, variants: Collection[Variant]) -> tuple[CacheSpec, ...]:
        """What the variants read of a REFRESH step, in the order of the plain graph."""
        values = {
            str(node.target): node.meta["val"]
            for variant in variants
            for node in variant.module.graph.nodes
            if node.op == "placeholder" and str(node.target) in variant.reads
        }
        if self.outputs is not None:
            values |= {cache_name(n.name): cached_form(n) for n in output_nodes(self.captured)}
        first = {target.nodes[0]: target for target in self.targets}
        sources: dict[str, tuple[str, str | None]] = {}
        for node in self.captured.graph.nodes:
            if node.name in first:
                target = first[node.name]
                sources[folded_name(target)] = (target.input_node, target.name)
            sources[cache_name(node.name)] = (node.name, None)
        return tuple(
            CacheSpec(
                name,
                node,
                folded,
                tuple(values[name].shape),
                values[name].dtype,
                1 if node in self.run_values else self.history,
            )
            for name, (node, folded) in sources.items()
            if name in values
        )

    def _finish(self, mode: StepMode, insert: Insertion, caches: Sequence[fx.Node] = ()) -> Variant:
        values = graph_outputs(insert.graph)
        if self.outputs is not None:
            keep_own = mode is not StepMode.FORECAST
            values = mix_outputs(insert, self.captured, self.latent, keep_own=keep_own)
        insert.graph.output_node().args = ((*values, *caches),)
        return _variant(mode, self.captured, insert)


def _variant(mode: StepMode, captured: CapturedGraph, insert: Insertion) -> Variant:
    graph, arguments = insert.graph, len(captured.signature.tensors)
    finish(graph)
    _drop_unused(graph, arguments)
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    tensors = {
        target: insert.attributes[target]
        if target in insert.attributes
        else read_attribute(captured.module, target)
        for target in sorted(targets)
    }
    live = {node.name for node in graph.nodes}
    # The target, not the name: fx renames a placeholder that a weight of the model is named like.
    reads = [str(node.target) for node in graph.nodes if node.op == "placeholder"][arguments:]
    return Variant(
        mode=mode,
        module=fx.GraphModule(tensors, graph, class_name=mode.name.capitalize()),
        reads=tuple(reads),
        inserted=tuple(node.name for node in insert.made if node.name in live),
    )


def _drop_unused(graph: fx.Graph, arguments: int) -> None:
    for node in [n for n in graph.nodes if n.op == "placeholder"][arguments:]:
        if not node.users:
            graph.erase_node(node)
