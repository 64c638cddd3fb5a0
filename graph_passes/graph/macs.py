"""Multiply-accumulates of nodes and graphs, counted from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from calicache.graph_passes.graph.operations import quantised_product
from calicache.graph_passes.graph.surgery import shape_of
from calicache.graph_passes.graph.whole import is_whole

aten = torch.ops.aten


def graph_macs(graph: fx.Graph) -> int:
    """Multiply-accumulates of one run of a graph."""
    return sum(count_macs(graph).values())


def count_macs(graph: fx.Graph) -> dict[str, int]:
    """Multiply-accumulates of every product of a graph, by the node's name."""
    return {node.name: node_macs(node) for node in graph.nodes if _is_product(node)}


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node; 0 for what is no product, 1 for a whole model."""
    if not _is_product(node):
        return int(is_whole(node))
    formula = FORMULAS.get(node.target)
    return formula(node) if formula else _counted(node)


def _dense(node: fx.Node, place: int) -> int:
    """Every number of the result sums over the last dimension of the operand at a place."""
    return math.prod(shape_of(node)) * shape_of(node.args[place])[-1]  # type: ignore[arg-type]


def _attention(node: fx.Node) -> int:
    """Scores, N M d a head, and what they mix, N M dv."""
    query, key = (node.args[place] for place in (0, 1))
    *rows, width = shape_of(node)
    return math.prod(rows) * shape_of(key)[-2] * (shape_of(query)[-1] + width)  # type: ignore[arg-type]


def _convolution(node: fx.Node) -> int:
    """Every number of the result sums over a window of the weight, (out, in / groups, *window)."""
    return math.prod(shape_of(node)) * math.prod(shape_of(node.args[1])[1:])  # type: ignore[arg-type]


FORMULAS: Mapping[Any, Callable[[fx.Node], int]] = {
    **dict.fromkeys(
        (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default),
        lambda node: _dense(node, 0),
    ),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), lambda node: _dense(node, 1)),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _convolution),
    aten.scaled_dot_product_attention.default: _attention,
    quantised_product: lambda node: _dense(node, 0),
}


PRODUCTS = frozenset(
    {
        aten.linear,
        aten.bilinear,
        aten.matmul,
        aten.mm,
        aten.bmm,
        aten.addmm,
        aten.baddbmm,
        aten.einsum,
        aten.tensordot,
        aten.inner,
        aten.linalg_multi_dot,
        aten.scaled_dot_product_attention,
        aten.convolution,
        aten.conv1d,
        aten.conv2d,
        aten.conv3d,
        aten.conv_transpose1d,
        aten.conv_transpose2d,
        aten.conv_transpose3d,
    }
)


def _counted(node: fx.Node) -> int:
    """The count of torch's own counter, where no formula is written here."""
    arguments, options = fx.node.map_arg((node.args, dict(node.kwargs)), _on_meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        node.target(*arguments, **options)  # type: ignore[operator]
    return int(counter.get_total_flops()) // 2


def _on_meta(node: fx.Node) -> Any:
    value = node.meta["val"]
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _is_product(node: fx.Node) -> bool:
    is_one = getattr(node.target, "overloadpacket", None) in PRODUCTS
    return is_one or node.target is quantised_product
