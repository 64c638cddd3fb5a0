"""What a drawing of a block, or of a model folded by block, consists of, whoever draws it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from calicache.graph_passes.describe.blocks import (
    CACHES,
    OUTPUT,
    BlockView,
    FoldedBlock,
    FoldedView,
    Leaving,
)
from calicache.graph_passes.describe.graphs import CacheWrite, Mark, NodeView
from calicache.tools.graph.text import describe_part, describe_shape, module_inside, some_values
from calicache.tools.terminal.text import format_count


class Kind(StrEnum):
    """What a drawn node stands for; BORDER is a value from or for another part of the model."""

    OPERATION = "operation"
    TENSOR = "tensor"
    CACHE = "cache"
    SCALAR = "scalar"
    BORDER = "border"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class DrawnNode:
    """One node of a drawing.

    Attributes:
        name: of the node in the graph; of the block where blocks are nodes.
        kind, mark: what it is and what the compiler did to it.
        lines: what stands in it.
        about: all that is known of it, as a tooltip.
    """

    name: str
    kind: Kind
    mark: Mark
    lines: tuple[str, ...]
    about: str


@dataclass(frozen=True, slots=True)
class DrawnEdge:
    """One edge of a drawing; `label` may be empty."""

    source: str
    target: str
    mark: Mark
    label: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawing before it is laid out."""

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]


LEGEND = tuple(
    DrawnNode(f"legend-{mark}", kind, mark, (what,), what)
    for mark, kind, what in (
        (Mark.PLAIN, Kind.OPERATION, "same as in the plain model"),
        (Mark.INSERTED, Kind.OPERATION, "inserted"),
        (Mark.REMOVED, Kind.OPERATION, "removed: does not run"),
        (Mark.CACHE, Kind.CACHE, "kept value"),
        (Mark.WEIGHT, Kind.SCALAR, "weight of the step"),
    )
)


def drawing_of(view: BlockView | FoldedView) -> Drawing:
    """The nodes and edges to draw for a view."""
    return _draw_block(view) if isinstance(view, BlockView) else _draw_folded(view)


def _draw_block(view: BlockView) -> Drawing:
    nodes = [
        *(_border(node) for node in view.enters),
        *(_node(node, view.block) for node in view.nodes),
        *(_write(write) for write in view.writes),
        *(_leaving(leaving) for leaving in view.leaves),
    ]
    edges = [
        *(DrawnEdge(edge.source, edge.target, edge.mark) for edge in view.edges),
        *(DrawnEdge(w.node, _write(w).name, Mark.CACHE) for w in view.writes),
        *(DrawnEdge(leave.value, _leaving(leave).name, leave.mark) for leave in view.leaves),
    ]
    return Drawing(f"{view.block}, {view.mode}", tuple(nodes), tuple(edges))


def _node(node: NodeView, block: str) -> DrawnNode:
    kind = {Mark.CACHE: Kind.CACHE, Mark.WEIGHT: Kind.SCALAR}.get(node.mark, Kind.OPERATION)
    what, place = node.op, module_inside(node, block)
    if node.op == "get_attr":
        kind, (place, _, what) = Kind.TENSOR, place.rpartition(".")
    elif node.op == "placeholder":
        what, place = node.name, ""
    shape = "" if node.shape is None else str(list(node.shape))
    lines = tuple(line for line in (what, place, shape) if line)
    return DrawnNode(node.name, kind, node.mark, lines, _about(node))


def _about(node: NodeView) -> str:
    facts = [f"{node.name}: {describe_shape(node)}", f"{node.op}, {node.mark}"]
    facts += [node.module] if node.module else []
    facts += [f"MACs {format_count(node.macs)}"] if node.macs else []
    return "\n".join(facts)


def _border(node: NodeView) -> DrawnNode:
    lines = (node.name, f"from {node.block}")
    return DrawnNode(node.name, Kind.BORDER, node.mark, lines, _about(node))


def _leaving(leaving: Leaving) -> DrawnNode:
    where = "the model's output" if leaving.part == OUTPUT else leaving.part
    lines = (leaving.value, f"to {where}")
    name = f"{leaving.value}-to-{leaving.part}"  # no node of a graph has a hyphen
    return DrawnNode(name, Kind.BORDER, leaving.mark, lines, " ".join(lines))


def _write(write: CacheWrite) -> DrawnNode:
    lines = (write.cache, "written")
    about = f"{write.cache}: REFRESH keeps {write.node}"
    return DrawnNode(f"{write.cache}-written", Kind.CACHE, Mark.CACHE, lines, about)


def _draw_folded(view: FoldedView) -> Drawing:
    edges = [
        DrawnEdge(edge.source, edge.target, edge.mark, some_values(edge, 1)) for edge in view.edges
    ]
    return Drawing(f"model, {view.mode}", tuple(_parts(view)), tuple(edges))


def _parts(view: FoldedView) -> Iterator[DrawnNode]:
    for block in view.blocks:
        about = f"{block.name}: {describe_part(block)}"
        changes = f"{block.same} same +{block.inserted} -{block.removed}"
        macs = f"{format_count(block.macs)} of {format_count(block.plain_macs)} MACs"
        lines = (block.name, changes, macs)
        yield DrawnNode(block.name, Kind.BLOCK, _part_mark(block), lines, about)
    if any(CACHES in (edge.source, edge.target) for edge in view.edges):
        about = "caches: what REFRESH steps keep"
        yield DrawnNode(CACHES, Kind.CACHE, Mark.CACHE, (CACHES,), about)


def _part_mark(block: FoldedBlock) -> Mark:
    if block.inserted:
        return Mark.INSERTED
    return Mark.REMOVED if block.removed and not block.same else Mark.PLAIN
