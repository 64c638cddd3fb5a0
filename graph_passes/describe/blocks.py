"""One block in one mode beside the plain graph, and the whole model folded by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from calicache.graph_passes.common.errors import SubjectError
from calicache.graph_passes.describe.graphs import (
    CacheWrite,
    GraphView,
    Mark,
    ModelGraphs,
    NodeView,
)
from calicache.graph_passes.describe.parts import RESTS
from calicache.graph_passes.settings.choices import StepMode

OUTPUT, CACHES = "output", "caches"


@dataclass(frozen=True, slots=True)
class EdgeView:
    """A value that one node reads of another.

    Attributes:
        source, target: names of the nodes.
        mark: INSERTED if the plain graph does not have it, REMOVED if the mode does not, CACHE
            for a kept value.
    """

    source: str
    target: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class Leaving:
    """A value of the block that another part reads; part `output` stands for the model's own."""

    value: str
    part: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class BlockView:
    """The plain graph of one block and that of a mode, merged.

    Attributes:
        block: its name.
        mode: `plain`, or the mode in lower case.
        nodes: of the block, in graph order; removed ones where they were, and weights and kept
            values before their first reader.
        edges: between these nodes and those that enter.
        enters: nodes of other parts that the block reads.
        leaves: values of the block that other parts read.
        writes: values of the block that REFRESH keeps.
        macs, plain_macs: multiply-accumulates of the block in the mode and in the plain graph.
    """

    block: str
    mode: str
    nodes: tuple[NodeView, ...]
    edges: tuple[EdgeView, ...]
    enters: tuple[NodeView, ...]
    leaves: tuple[Leaving, ...]
    writes: tuple[CacheWrite, ...]
    macs: int
    plain_macs: int

    def count(self, mark: Mark) -> int:
        """How many nodes of the block have a mark."""
        return sum(node.mark is mark for node in self.nodes)


@dataclass(frozen=True, slots=True)
class FoldedBlock:
    """One part of the model as one node.

    Attributes:
        name: of the block or rest.
        same, inserted, removed: how many nodes.
        reads, writes: how many kept values it reads and writes.
        weights: how many numbers of the step are made for it.
        macs, plain_macs: multiply-accumulates in the mode and in the plain graph.
    """

    name: str
    same: int
    inserted: int
    removed: int
    reads: int
    writes: int
    weights: int
    macs: int
    plain_macs: int


@dataclass(frozen=True, slots=True)
class FoldedEdge:
    """Values that go from one part to another; the part `caches` stands for what is kept."""

    source: str
    target: str
    values: tuple[str, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class FoldedView:
    """A whole model, folded by block.

    Attributes:
        mode: `plain`, or the mode in lower case.
        blocks: all parts, in the order in which they run.
        edges: between them, and to and from the caches.
    """

    mode: str
    blocks: tuple[FoldedBlock, ...]
    edges: tuple[FoldedEdge, ...]


def find_block(graphs: ModelGraphs, text: str) -> str:
    """The name of a part by its name, or by its number where one list has that number.

    Raises:
        SubjectError: there is none, or several lists have one.
    """
    matches = [text] if text in graphs.parts else []
    if not matches:
        matches = [block for block in graphs.blocks if block.rpartition(".")[2] == text]
    if len(matches) != 1:
        got = f"{text!r}, which is {' or '.join(matches)}" if matches else repr(text)
        raise SubjectError("block", expected=_known(graphs), got=got, fix="Choose one of these.")
    return matches[0]


def _known(graphs: ModelGraphs) -> str:
    """All parts, of a long list the first and the last."""
    lists: dict[str, list[str]] = {}
    for part in graphs.parts:
        lists.setdefault(part if part in RESTS else part.rpartition(".")[0], []).append(part)
    return ", ".join(
        f"{names[0]} .. {names[-1]}" if len(names) > 2 else ", ".join(names)
        for names in lists.values()
    )


def view_block(graphs: ModelGraphs, block: str, mode: StepMode | None = None) -> BlockView:
    """Merge the plain graph of a block with that of a mode.

    Args:
        graphs: from `view_graphs`.
        block: a name such as `blocks.3` or `before`, or its number such as `3`.
        mode: None for the plain graph alone.

    Raises:
        SubjectError: there is no such block or mode.
    """
    block, graph = find_block(graphs, block), graphs.graph(mode)
    merged = _merge(graphs.plain, graph)
    nodes = [node for node in merged.nodes.values() if node.block == block]
    names = {node.name for node in nodes}
    edges = [edge for edge in merged.edges if edge.target in names]
    read = {edge.source for edge in edges} - names
    return BlockView(
        block=block,
        mode=graph.mode,
        nodes=tuple(_sources_late(nodes)),
        edges=tuple(edges),
        enters=tuple(node for node in merged.nodes.values() if node.name in read),
        leaves=_leaves(merged, names, graphs.plain, graph),
        writes=tuple(write for write in graph.writes if write.node in names),
        macs=_macs(graph, block),
        plain_macs=_macs(graphs.plain, block),
    )


def fold_blocks(graphs: ModelGraphs, mode: StepMode | None = None) -> FoldedView:
    """The whole model with one node for every block.

    Args:
        graphs: from `view_graphs`.
        mode: None for the plain graph.

    Raises:
        SubjectError: there is no such mode.
    """
    graph = graphs.graph(mode)
    merged = _merge(graphs.plain, graph)
    marks: dict[tuple[str, str], dict[str, set[Mark]]] = {}  # by parts, then by value

    def add(source: str, target: str, value: str, mark: Mark) -> None:
        if source != target:
            marks.setdefault((source, target), {}).setdefault(value, set()).add(mark)

    for edge in merged.edges:
        source = CACHES if edge.mark is Mark.CACHE else merged.nodes[edge.source].block
        add(source, merged.nodes[edge.target].block, edge.source, edge.mark)
    for write in graph.writes:
        add(merged.nodes[write.node].block, CACHES, write.cache, Mark.CACHE)
    return FoldedView(
        graph.mode,
        tuple(_fold(part, merged, graphs.plain, graph) for part in graphs.parts),
        tuple(_folded_edge(*pair, values) for pair, values in marks.items()),
    )


def _fold(part: str, merged: _Merged, plain: GraphView, graph: GraphView) -> FoldedBlock:
    nodes = {node.name: node for node in merged.nodes.values() if node.block == part}
    counts = Counter(node.mark for node in nodes.values())
    return FoldedBlock(
        name=part,
        same=counts[Mark.PLAIN],
        inserted=counts[Mark.INSERTED],
        removed=counts[Mark.REMOVED],
        reads=counts[Mark.CACHE],
        writes=sum(write.node in nodes for write in graph.writes),
        weights=counts[Mark.WEIGHT],
        macs=_macs(graph, part),
        plain_macs=_macs(plain, part),
    )


def _folded_edge(source: str, target: str, values: Mapping[str, set[Mark]]) -> FoldedEdge:
    mark = _together(frozenset[Mark]().union(*values.values()))
    gone = {Mark.REMOVED}
    named = (name for name, marks in values.items() if mark is Mark.REMOVED or marks != gone)
    return FoldedEdge(source, target, tuple(named), mark)


def _together(marks: frozenset[Mark]) -> Mark:
    """Several edges as one: what both graphs have, by whatever way, is plain."""
    if len(marks) == 1:
        return next(iter(marks))
    return Mark.CACHE if Mark.CACHE in marks else Mark.PLAIN


def _macs(graph: GraphView, part: str) -> int:
    return sum(node.macs for node in graph.nodes if node.block == part)


@dataclass(frozen=True, slots=True)
class _Merged:
    """The plain graph and that of a mode as one: nodes by name in graph order, and all edges."""

    nodes: Mapping[str, NodeView]
    edges: Sequence[EdgeView]


def _merge(plain: GraphView, graph: GraphView) -> _Merged:
    """Removed nodes come behind the node that they followed."""
    now, before = ({n.name: n for n in view.nodes} for view in (graph, plain))
    gone: dict[str, list[NodeView]] = {"": []}
    last = ""
    for node in plain.nodes:
        if node.name in now:
            last = node.name
        else:
            gone.setdefault(last, []).append(replace(node, mark=Mark.REMOVED))
    order = list(gone[""])
    for node in graph.nodes:
        order += [node, *gone.get(node.name, ())]
    nodes = {node.name: node for node in order}
    edges = []
    for name in nodes:
        new, old = ((view[name].inputs if name in view else ()) for view in (now, before))
        for source in dict.fromkeys((*new, *old)):
            mark = Mark.PLAIN if source in old else Mark.INSERTED
            mark = mark if source in new else Mark.REMOVED
            mark = Mark.CACHE if nodes[source].mark is Mark.CACHE else mark
            edges.append(EdgeView(source, name, mark))
    return _Merged(nodes, edges)


def _sources_late(nodes: Sequence[NodeView]) -> list[NodeView]:
    """What reads nothing, such as weights and kept values, right before its first reader."""
    waiting = {node.name: node for node in nodes if not node.inputs}
    order: list[NodeView] = []
    for node in nodes:
        if node.inputs:
            order += [waiting.pop(name) for name in node.inputs if name in waiting]
            order.append(node)
    return [*waiting.values(), *order]


def _leaves(
    merged: _Merged, names: set[str], plain: GraphView, graph: GraphView
) -> tuple[Leaving, ...]:
    """Values of a block by the part that reads them, in graph order."""
    marks_by_value: dict[tuple[str, str], set[Mark]] = {}
    for edge in merged.edges:
        if edge.source in names and edge.target not in names:
            part = merged.nodes[edge.target].block
            marks_by_value.setdefault((edge.source, part), set()).add(edge.mark)
    for name in dict.fromkeys((*graph.outputs, *plain.outputs)):
        if name in names:
            mark = Mark.PLAIN if name in plain.outputs else Mark.INSERTED
            mark = mark if name in graph.outputs else Mark.REMOVED
            marks_by_value.setdefault((name, OUTPUT), set()).add(mark)
    return tuple(
        Leaving(*key, _together(frozenset(marks))) for key, marks in marks_by_value.items()
    )
