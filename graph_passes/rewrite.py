"""From the plain graph to one variant per step mode, with the caches as inputs and outputs.

Linear layers whose output is cached are written over rows (T, channels), T being all tokens of
the batch: ONNX Runtime runs them as one GEMM that writes straight into the cache, where a
value taken after the reshape that follows the GEMM would be copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from calicache.graph_passes.branches import LINEAR
from calicache.graph_passes.capture import CapturedGraph, finish, graph_outputs
from calicache.graph_passes.decompose import CalibrationFactors
from calicache.graph_passes.insertion import Insertion, cache_name
from calicache.graph_passes.plan import StepMode
from calicache.graph_passes.sites import LinearSite, Sites

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One value that a REFRESH step keeps for the cheap steps after it.

    Attributes:
        name: of the placeholder that takes it, such as `cache_linear_4`.
        node: whose value it is in the plain graph; x for a folded cache, which is A x.
        folded: the site whose A is applied, or None.
        shape, dtype: of the cached value.
    """

    name: str
    node: str
    folded: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Variant:
    """The graph of one mode.

    Attributes:
        mode: REFRESH, CALIBRATE or REUSE.
        module: takes the model's tensors, then the caches named in `reads`; returns the
            model's flat outputs, then (REFRESH alone) all caches.
        reads: cache names, in the order of the placeholders.
        inserted: names of the nodes that the plain graph does not have.
    """

    mode: StepMode
    module: fx.GraphModule
    reads: tuple[str, ...]
    inserted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """All variants of one model and the caches they share.

    Attributes:
        variants: by mode; REFRESH is always there.
        caches: in the order of REFRESH's extra outputs.
        outputs: how many flat outputs the model itself has.
    """

    variants: Mapping[StepMode, Variant]
    caches: tuple[CacheSpec, ...]
    outputs: int


def rewrite(
    captured: CapturedGraph,
    sites: Sites,
    factors: Mapping[str, CalibrationFactors],
    modes: Collection[StepMode],
    folded: frozenset[str] = frozenset(),
) -> Rewritten:
    """Make the variants for some modes.

    Args:
        captured: the plain graph; it is copied, not changed.
        sites: sites and branches.
        factors: by site name; needed where CALIBRATE is among the modes.
        modes: which variants a schedule uses; REFRESH is made in any case.
        folded: sites that cache A x instead of x, from `choose_folds`.
    """
    variants: dict[StepMode, Variant] = {}
    if StepMode.CALIBRATE in modes:
        tapped = [b.exit for b in sites.branches] if StepMode.REUSE in modes else []
        variants[StepMode.CALIBRATE] = calibrate_variant(
            captured, sites.linears, factors, folded, tapped
        )
    if StepMode.REUSE in modes:
        variants[StepMode.REUSE] = reuse_variant(captured, sites)
    caches = _caches(captured, sites, variants)
    refresh = refresh_variant(captured, caches, factors)
    outputs = len(graph_outputs(captured.graph))
    return Rewritten({StepMode.REFRESH: refresh, **variants}, caches, outputs)


def refresh_variant(
    captured: CapturedGraph,
    caches: tuple[CacheSpec, ...],
    factors: Mapping[str, CalibrationFactors],
) -> Variant:
    """The plain graph with the cached values as further outputs; A x for folded ones."""
    graph, copies = _copy(captured.graph)
    output = graph.output_node()
    insert = Insertion(graph)
    values = []
    for cache in caches:
        value = copies[cache.node]
        if cache.folded is not None:
            with graph.inserting_before(value.next):
                rows = insert.rows(value)
            with graph.inserting_before(rows.next):
                value = insert.linear(rows, cache.folded, "down", factors[cache.folded].down)
        elif value.target is LINEAR:
            value = insert.linear_over_rows(value)
        values.append(value)
    output.args = ((*graph_outputs(graph), *values),)
    return _variant(StepMode.REFRESH, captured, insert)


def calibrate_variant(
    captured: CapturedGraph,
    linears: tuple[LinearSite, ...],
    factors: Mapping[str, CalibrationFactors],
    folded: frozenset[str] = frozenset(),
    tapped: Collection[str] = (),
) -> Variant:
    """Every site becomes y_ref + B A (x - x_ref), or y_ref + B (A x - z_ref) where folded.

    Sites that share x share x - x_ref. At rank 0 the site is just y_ref. Linear layers in
    `tapped` that are no sites run over rows as in REFRESH, so that both read one weight layout.
    """
    graph, copies = _copy(captured.graph)
    insert = Insertion(graph)
    increments: dict[str, fx.Node] = {}
    for site in linears:
        node, made = copies[site.node], factors[site.name]
        source = node.args[0]  # not the plain input: that may be a site of its own
        assert isinstance(source, fx.Node)
        with graph.inserting_before(node):
            if made.rank == 0:
                node.replace_all_uses_with(insert.anchor(node))
                continue
            if site.name in folded:
                inner = insert.linear(insert.rows(source), site.name, "down", made.down)
                inner_anchor = insert.cache(_folded_name(site.node), inner.meta["val"])
                inner = insert.call(aten.sub.Tensor, inner, inner_anchor, site.name)
            else:
                if source.name not in increments:
                    increments[source.name] = insert.call(
                        aten.sub.Tensor, source, insert.anchor(copies[site.input_node]), site.name
                    )
                increment = insert.rows(increments[source.name])
                inner = insert.linear(increment, site.name, "down", made.down)
            correction = insert.linear(inner, site.name, "up", made.up)
            total = insert.call(aten.add.Tensor, insert.cached(node), correction, site.name)
            node.replace_all_uses_with(insert.shaped(total, node))
    replaced = {site.node for site in linears}
    for name in tapped:
        if name not in replaced and copies[name].target is LINEAR:
            insert.linear_over_rows(copies[name])
    return _variant(StepMode.CALIBRATE, captured, insert)


def reuse_variant(captured: CapturedGraph, sites: Sites) -> Variant:
    """Every branch becomes its cached output; what is inside goes away as dead code."""
    graph, copies = _copy(captured.graph)
    insert = Insertion(graph)
    for branch in sites.branches:
        last = copies[branch.exit]
        with graph.inserting_before(last):
            last.replace_all_uses_with(insert.anchor(last))
    return _variant(StepMode.REUSE, captured, insert)


def _caches(
    captured: CapturedGraph, sites: Sites, variants: Mapping[StepMode, Variant]
) -> tuple[CacheSpec, ...]:
    """What the cheap variants read, in the order of the plain graph."""
    values = {
        node.name: node.meta["val"]
        for variant in variants.values()
        for node in variant.module.graph.nodes
        if node.name in variant.reads
    }
    sources: dict[str, tuple[str, str | None]] = {}
    by_node = {site.node: site for site in sites.linears}
    for node in captured.graph.nodes:
        site = by_node.get(node.name)
        if site is not None:
            sources[_folded_name(node.name)] = (site.input_node, site.name)
        sources[cache_name(node.name)] = (node.name, None)
    return tuple(
        CacheSpec(name, node, folded, tuple(values[name].shape), values[name].dtype)
        for name, (node, folded) in sources.items()
        if name in values
    )


def _copy(source: fx.Graph) -> tuple[fx.Graph, dict[str, fx.Node]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(source, copies)
    graph.output(output)
    return graph, {node.name: copy for node, copy in copies.items()}


def _folded_name(node: str) -> str:
    return f"cache_{node}_down"


def _variant(mode: StepMode, captured: CapturedGraph, insert: Insertion) -> Variant:
    graph, arguments = insert.graph, len(captured.signature.tensors)
    finish(graph)
    _drop_unused_caches(graph, arguments)
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    tensors = {
        target: insert.attributes[target]
        if target in insert.attributes
        else captured.attribute(target)
        for target in sorted(targets)
    }
    live = {node.name for node in graph.nodes}
    reads = [node.name for node in graph.nodes if node.op == "placeholder"][arguments:]
    return Variant(
        mode=mode,
        module=fx.GraphModule(tensors, graph, class_name=mode.name.capitalize()),
        reads=tuple(reads),
        inserted=tuple(node.name for node in insert.made if node.name in live),
    )


def _drop_unused_caches(graph: fx.Graph, arguments: int) -> None:
    for node in [n for n in graph.nodes if n.op == "placeholder"][arguments:]:
        if not node.users:
            graph.erase_node(node)
