"""The graphs of an optimised model as plain data, to be looked at without model and weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor, fx

from calicache.graph_passes.common.errors import SubjectError, VerifyError
from calicache.graph_passes.describe.parts import (
    AFTER,
    BEFORE,
    BETWEEN,
    RESTS,
    WHOLE,
    BlockPaths,
    dotted_place,
    find_blocks,
    find_parts,
    target_part,
)
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.macs import count_macs
from calicache.graph_passes.graph.surgery import graph_outputs, module_path
from calicache.graph_passes.rewriting.variants import Variant, VariantSet
from calicache.graph_passes.settings.choices import StepMode

PLAIN = "plain"


class Mark(StrEnum):
    """What the compiler did to a node.

    PLAIN is as in the plain graph, INSERTED is new, REMOVED no longer runs (in merged views
    alone), CACHE reads a kept value, WEIGHT reads a number of the step from a table.
    """

    PLAIN = "plain"
    INSERTED = "inserted"
    REMOVED = "removed"
    CACHE = "cache"
    WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node.

    Attributes:
        name: of the fx node; the same in every mode for nodes of the plain graph.
        op: in short, such as `linear`, `add`, `placeholder`, `get_attr`.
        inputs: names of the nodes it reads.
        shape, dtype: of its value; None where that is no tensor.
        block: such as `blocks.3`; `before`, `between` or `after` the blocks for the rest.
        module: dotted path of the module that made it; of the tensor for `get_attr`, of the
            target for a calibration branch.
        mark: what the compiler did.
        macs: multiply-accumulates of one run.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None
    dtype: str | None
    block: str
    module: str
    mark: Mark = Mark.PLAIN
    macs: int = 0


@dataclass(frozen=True, slots=True)
class CacheWrite:
    """A value that REFRESH keeps: the cache and the node that makes it."""

    cache: str
    node: str


@dataclass(frozen=True, slots=True)
class GraphView:
    """One graph.

    Attributes:
        mode: `plain`, or the mode in lower case.
        nodes: in the order in which they run.
        outputs: names of the nodes that are the model's own outputs.
        writes: what a REFRESH step keeps.
    """

    mode: str
    nodes: tuple[NodeView, ...]
    outputs: tuple[str, ...]
    writes: tuple[CacheWrite, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelGraphs:
    """All graphs of one model.

    Attributes:
        plain: the graph as it was captured.
        modes: by mode; REFRESH is always there.
        blocks: names of the repeated blocks, in the order in which they run.
    """

    plain: GraphView
    modes: Mapping[StepMode, GraphView]
    blocks: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """The blocks and the rests that hold nodes."""
        order = (BEFORE, *self.blocks, BETWEEN, AFTER) if self.blocks else (WHOLE,)
        views = (self.plain, *self.modes.values())
        used = {node.block for view in views for node in view.nodes}
        return tuple(part for part in order if part in used)

    def graph(self, mode: StepMode | None) -> GraphView:
        """The graph of a mode; the plain one for None.

        Raises:
            SubjectError: there is no graph of that mode.
        """
        if mode is None:
            return self.plain
        if mode not in self.modes:
            known = (PLAIN, *(mode.name.lower() for mode in self.modes))
            raise SubjectError(
                "mode",
                expected=" | ".join(known),
                got=repr(mode.name.lower()),
                fix="Choose one of these: a plan makes the modes that its schedule uses.",
            )
        return self.modes[mode]


def view_graphs(captured: CapturedGraph, variant_set: VariantSet) -> ModelGraphs:
    """The plain graph and that of every mode.

    Args:
        captured: the plain graph, `OptimizedModel.captured`.
        variant_set: its variants, `OptimizedModel.variant_set`.

    Raises:
        VerifyError: the names of a variant do not agree with the plain graph.
    """
    calls = [node for node in captured.graph.nodes if node.op == "call_function"]
    paths = find_blocks(module_path(node).split("@")[0] for node in calls)
    parts, macs = find_parts(captured.graph, paths), count_macs(captured.graph)
    nodes = tuple(
        _node_view(node, parts[node.name], macs.get(node.name, 0))
        for node in captured.graph.nodes
        if node.op != "output"
    )
    plain = GraphView(PLAIN, nodes, _names(graph_outputs(captured.graph)))
    modes = {
        mode: _view_variant(variant, plain, variant_set, paths)
        for mode, variant in sorted(variant_set.variants.items())
    }
    ran = dict.fromkeys((*(parts[node.name] for node in calls), *parts.values()))
    blocks = tuple(part for part in ran if part not in (*RESTS, WHOLE))
    return ModelGraphs(plain, modes, blocks)


def _view_variant(
    variant: Variant,
    plain: GraphView,
    variant_set: VariantSet,
    paths: BlockPaths,
) -> GraphView:
    graph, known = variant.module.graph, {node.name: node for node in plain.nodes}
    marks = _marks(variant, known, variant_set.slots())
    places = _cache_places(graph, known, variant_set, paths)
    given = {name: node.block for name, node in known.items()}
    parts = find_parts(graph, paths, given | {name: part for name, (part, _) in places.items()})
    counts = count_macs(graph)
    views: dict[str, NodeView] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        name, old = node.name, known.get(node.name)
        macs = counts.get(name, 0) if old is None else old.macs
        view = _node_view(node, parts[name], macs, marks[name])
        if name in places:
            view = replace(view, module=places[name][1])
        elif old is None and not node.meta.get("nn_module_stack"):
            sources = [views[source].module for source in view.inputs]
            view = replace(view, module=next(filter(None, sources), ""))
        _check_name(view, old, variant)
        views[name] = view
    values, own = _names(graph_outputs(graph)), len(plain.outputs)
    writes = tuple(
        CacheWrite(name, node) for name, node in zip(variant.writes, values[own:], strict=True)
    )
    return GraphView(variant.mode.name.lower(), tuple(views.values()), values[:own], writes)


def _cache_places(
    graph: fx.Graph, known: Mapping[str, NodeView], variant_set: VariantSet, paths: BlockPaths
) -> dict[str, tuple[str, str]]:
    """Part and module of every kept value that a variant reads: those of what is kept."""
    slots = variant_set.slots()
    places = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name not in known and str(node.target) in slots:
            cache, _ = slots[str(node.target)]
            source = known[cache.node]
            target = cache.folded or source.module
            places[node.name] = (target_part(target, source.block, paths), target)
    return places


def _marks(variant: Variant, known: Collection[str], slots: Collection[str]) -> dict[str, Mark]:
    inserted = frozenset(variant.inserted)
    marks: dict[str, Mark] = {}
    for node in variant.module.graph.nodes:
        mark = Mark.INSERTED if node.name in inserted else Mark.PLAIN
        if node.op == "placeholder" and node.name not in known:
            mark = Mark.CACHE if str(node.target) in slots else Mark.WEIGHT
        marks[node.name] = mark
    return marks


def _check_name(view: NodeView, old: NodeView | None, variant: Variant) -> None:
    """What has a name of the plain graph is that node, and nothing else is marked plain."""
    same = old is not None and (view.op, view.shape) == (old.op, old.shape)
    if same != (view.mark is Mark.PLAIN):
        raise VerifyError(
            f"{view.name} of {variant.mode.name}",
            expected="an inserted node, a read, or the plain graph's node of that name",
            got=f"{view.mark} {view.op} {view.shape}",
            fix="This is a defect of calicache, not of your model; please report it.",
        )


def _node_view(node: fx.Node, part: str, macs: int, mark: Mark = Mark.PLAIN) -> NodeView:
    value = node.meta.get("val")
    tensor = value if isinstance(value, Tensor) else None
    return NodeView(
        name=node.name,
        op=_short_op(node),
        inputs=tuple(source.name for source in node.all_input_nodes),
        shape=None if tensor is None else tuple(int(size) for size in tensor.shape),
        dtype=None if tensor is None else str(tensor.dtype).removeprefix("torch."),
        block=part,
        module=dotted_place(node),
        mark=mark,
        macs=macs,
    )


def _short_op(node: fx.Node) -> str:
    """`aten.linear.default` as `linear`."""
    if node.op != "call_function":
        return str(node.op)
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _names(values: Sequence[fx.node.Argument]) -> tuple[str, ...]:
    return tuple(value.name for value in values if isinstance(value, fx.Node))
