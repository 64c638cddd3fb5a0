"""A block of a rewritten graph, and a whole model folded by block, as plain text."""

from __future__ import annotations

from collections.abc import Iterator

from calicache.graph_passes.describe.blocks import (
    BlockView,
    FoldedBlock,
    FoldedEdge,
    FoldedView,
    Leaving,
)
from calicache.graph_passes.describe.graphs import Mark, NodeView
from calicache.tools.terminal.text import format_count

SIGNS = {Mark.PLAIN: " ", Mark.INSERTED: "+", Mark.REMOVED: "-", Mark.CACHE: "=", Mark.WEIGHT: "%"}
NAMES = {
    Mark.PLAIN: "same",
    Mark.INSERTED: "inserted",
    Mark.REMOVED: "removed",
    Mark.CACHE: "read from caches",
    Mark.WEIGHT: "weights of the step",
}
_SIGNS_LINE = "signs: + inserted, - removed, = cache, % weight of the step"
_MOST_VALUES = 4


def block_text(view: BlockView) -> str:
    """One line for every node of a block: sign, name, operation, inputs, shape, module.

    Lines with `>` are values that enter the block, with `<` values that leave it.
    """
    counts = [f"{view.count(mark)} {name}" for mark, name in NAMES.items() if view.count(mark)]
    if view.writes:
        counts.append(f"{len(view.writes)} written to caches")
    lines = [
        f"{view.block}, {view.mode}: {', '.join(counts) or 'no nodes'}",
        f"MACs: {_macs(view.macs, view.plain_macs)}",
        f"{_SIGNS_LINE}, > enters, < leaves",
        "",
        *(f"> {n.name}: {describe_shape(n)} from {n.block}" for n in view.enters),
        *_node_lines(view),
        *(_leaving_line(leaving) for leaving in view.leaves),
    ]
    return "\n".join(lines) + "\n"


def folded_text(view: FoldedView) -> str:
    """One line for every part of a model, then one for every edge between two of them."""
    macs = sum(block.macs for block in view.blocks)
    plain = sum(block.plain_macs for block in view.blocks)
    lines = [
        f"model, {view.mode}: {len(view.blocks)} parts",
        f"MACs: {_macs(macs, plain)}",
        _SIGNS_LINE,
        "",
        *(f"  {block.name}: {describe_part(block)}" for block in view.blocks),
        "",
        *(_edge_line(edge) for edge in view.edges),
    ]
    return "\n".join(lines) + "\n"


def describe_shape(node: NodeView) -> str:
    """`float32 [2, 49, 8]`; `-` for what is no tensor."""
    return "-" if node.shape is None else f"{node.dtype} {list(node.shape)}"


def describe_part(block: FoldedBlock) -> str:
    """What became of the nodes of one part of the model, and what it costs."""
    counts = [f"{block.same} same", f"+{block.inserted}", f"-{block.removed}"]
    counts += [f"={block.reads} read"] if block.reads else []
    counts += [f"={block.writes} written"] if block.writes else []
    counts += [f"%{block.weights}"] if block.weights else []
    return f"{' '.join(counts)}, MACs {_macs(block.macs, block.plain_macs)}"


def module_inside(node: NodeView, block: str) -> str:
    """The node's module or weight, without the path of its block."""
    path = block.partition("@")[0]
    return "" if node.module == path else node.module.removeprefix(f"{path}.")


def some_values(edge: FoldedEdge, most: int) -> str:
    """Names of the values of an edge; of more than `most`, how many."""
    return ", ".join(edge.values) if len(edge.values) <= most else f"{len(edge.values)} values"


def _macs(now: int, plain: int) -> str:
    share = f" ({now / plain:.3f})" if plain else ""
    return f"{format_count(now)} of {format_count(plain)}{share}"


def _node_lines(view: BlockView) -> Iterator[str]:
    for node in view.nodes:
        module = module_inside(node, view.block)
        value = f"{SIGNS[node.mark]} {node.name}: {describe_shape(node)}"
        place = f"  # {module}" if module else ""
        inputs = f"({', '.join(node.inputs)})" if node.inputs else ""
        yield f"{value} = {node.op}{inputs}{place}"
        for write in view.writes:
            if write.node == node.name:
                yield f"= {write.cache} <- {node.name}"


def _leaving_line(leaving: Leaving) -> str:
    changed = {Mark.INSERTED: ", inserted", Mark.REMOVED: ", removed"}.get(leaving.mark, "")
    return f"< {leaving.value} to {leaving.part}{changed}"


def _edge_line(edge: FoldedEdge) -> str:
    return f"{SIGNS[edge.mark]} {edge.source} -> {edge.target}: {some_values(edge, _MOST_VALUES)}"
