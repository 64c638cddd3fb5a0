"""From the plain graph to one variant per step mode, with the caches as inputs and outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calicache.graph_passes.branches import LINEAR
from calicache.graph_passes.capture import CapturedGraph, finish, shape_of
from calicache.graph_passes.decompose import CalibrationFactors
from calicache.graph_passes.plan import StepMode
from calicache.graph_passes.sites import LinearSite, Sites

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One value that a REFRESH step keeps for the cheap steps after it.

    Attributes:
        name: of the placeholder that takes it, such as `cache_linear_4`.
        node: whose value it is in the plain graph.
        shape, dtype: of the value.
    """

    name: str
    node: str
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
) -> Rewritten:
    """Make the variants for some modes.

    Args:
        captured: the plain graph; it is copied, not changed.
        sites: sites and branches.
        factors: by site name; needed where CALIBRATE is among the modes.
        modes: which variants a schedule uses; REFRESH is made in any case.
    """
    variants: dict[StepMode, Variant] = {}
    if StepMode.CALIBRATE in modes:
        variants[StepMode.CALIBRATE] = calibrate_variant(captured, sites.linears, factors)
    if StepMode.REUSE in modes:
        variants[StepMode.REUSE] = reuse_variant(captured, sites)
    read = {name for variant in variants.values() for name in variant.reads}
    caches = tuple(
        CacheSpec(_cache_name(node.name), node.name, shape_of(node), node.meta["val"].dtype)
        for node in captured.graph.nodes
        if _cache_name(node.name) in read
    )
    refresh = refresh_variant(captured, caches)
    outputs = len(_outputs(captured.graph))
    return Rewritten({StepMode.REFRESH: refresh, **variants}, caches, outputs)


def refresh_variant(captured: CapturedGraph, caches: tuple[CacheSpec, ...]) -> Variant:
    """The plain graph with the cached values as further outputs."""
    graph, copies = _copy(captured.graph)
    graph.output((*_outputs(graph), *(copies[cache.node] for cache in caches)))
    graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
    return _variant(StepMode.REFRESH, captured, graph, {}, frozenset())


def calibrate_variant(
    captured: CapturedGraph,
    linears: tuple[LinearSite, ...],
    factors: Mapping[str, CalibrationFactors],
) -> Variant:
    """Every site becomes y_ref + B A (x - x_ref); at rank 0 just y_ref."""
    graph, copies = _copy(captured.graph)
    attributes: dict[str, Tensor] = {}
    cached: dict[str, fx.Node] = {}
    inserted: set[str] = set()
    for site in linears:
        node, source = copies[site.node], copies[site.input_node]
        output_cache = _cache_placeholder(graph, node, site.node, cached)
        replacement = output_cache
        if factors[site.name].rank:
            input_cache = _cache_placeholder(graph, source, site.input_node, cached)
            branch = _insert_branch(
                graph, site, node, input_cache, output_cache, factors[site.name], attributes
            )
            inserted |= {made.name for made in branch}
            replacement = branch[-1]
        node.replace_all_uses_with(replacement)
    return _variant(StepMode.CALIBRATE, captured, graph, attributes, inserted)


def reuse_variant(captured: CapturedGraph, sites: Sites) -> Variant:
    """Every branch becomes its cached output; what is inside goes away as dead code."""
    graph, copies = _copy(captured.graph)
    cached: dict[str, fx.Node] = {}
    for branch in sites.branches:
        last = copies[branch.exit]
        last.replace_all_uses_with(_cache_placeholder(graph, last, branch.exit, cached))
    return _variant(StepMode.REUSE, captured, graph, {}, frozenset())


def _copy(source: fx.Graph) -> tuple[fx.Graph, dict[str, fx.Node]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(source, copies)
    graph.output(output)
    return graph, {node.name: copy for node, copy in copies.items()}


def _outputs(graph: fx.Graph) -> tuple[fx.node.Argument, ...]:
    last = next(node for node in reversed(graph.nodes) if node.op == "output")
    outputs = last.args[0]
    assert isinstance(outputs, tuple)
    return outputs


def _cache_name(node: str) -> str:
    return f"cache_{node}"


def _cache_placeholder(
    graph: fx.Graph, like: fx.Node, node: str, cached: dict[str, fx.Node]
) -> fx.Node:
    """The placeholder for a cached value, made once per variant."""
    if node not in cached:
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            cached[node] = graph.placeholder(_cache_name(node))
        cached[node].meta["val"] = like.meta["val"]
    return cached[node]


def _insert_branch(
    graph: fx.Graph,
    site: LinearSite,
    node: fx.Node,
    input_cache: fx.Node,
    output_cache: fx.Node,
    factors: CalibrationFactors,
    attributes: dict[str, Tensor],
) -> tuple[fx.Node, ...]:
    """y_ref + B A (x - x_ref) before `node`; returns the six new nodes, the sum last."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    down, up = f"calibration.{site.name}.down", f"calibration.{site.name}.up"
    attributes |= {down: factors.down, up: factors.up}
    val = source.meta["val"]
    with graph.inserting_before(node):
        increment = graph.call_function(aten.sub.Tensor, (source, input_cache))
        down_weight = graph.get_attr(down)
        inner = graph.call_function(LINEAR, (increment, down_weight))
        up_weight = graph.get_attr(up)
        correction = graph.call_function(LINEAR, (inner, up_weight))
        total = graph.call_function(aten.add.Tensor, (output_cache, correction))
    made = (increment, down_weight, inner, up_weight, correction, total)
    shapes: tuple[tuple[int, ...], ...] = (
        tuple(val.shape),
        tuple(factors.down.shape),
        (*val.shape[:-1], factors.rank),
        tuple(factors.up.shape),
        tuple(node.meta["val"].shape),
        tuple(node.meta["val"].shape),
    )
    for new, shape in zip(made, shapes, strict=True):
        new.meta = {**node.meta, "val": val.new_empty(shape), "calibrates": site.name}
    return made


def _variant(
    mode: StepMode,
    captured: CapturedGraph,
    graph: fx.Graph,
    attributes: Mapping[str, Tensor],
    inserted: Collection[str],
) -> Variant:
    finish(graph)
    _drop_unused_caches(graph, len(captured.signature.tensors))
    weights = {
        str(node.target): attributes.get(str(node.target), None)
        for node in graph.nodes
        if node.op == "get_attr"
    }
    tensors = {
        target: captured.attribute(target) if value is None else value
        for target, value in weights.items()
    }
    module = fx.GraphModule(tensors, graph, class_name=mode.name.capitalize())
    reads = [n.name for n in graph.nodes if n.op == "placeholder"]
    live = {node.name for node in graph.nodes}
    return Variant(
        mode,
        module,
        tuple(reads[len(captured.signature.tensors) :]),
        tuple(name for name in (n.name for n in graph.nodes) if name in inserted and name in live),
    )


def _drop_unused_caches(graph: fx.Graph, arguments: int) -> None:
    for node in [n for n in graph.nodes if n.op == "placeholder"][arguments:]:
        if not node.users:
            graph.erase_node(node)
