"""Multiply-accumulates of nodes and graphs, counted from shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


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


def graph_macs(graph: fx.Graph) -> int:
    """Multiply-accumulates of one run of a graph."""
    return sum(count_macs(graph).values())


def count_macs(graph: fx.Graph) -> dict[str, int]:
    """Multiply-accumulates of every product of a graph, by the node's name.

    Blocks are alike, so products of one operation and one set of shapes are counted once.
    """
    products = [node for node in graph.nodes if _is_product(node)]
    by_form: dict[str, int] = {}
    for node in products:
        if _form(node) not in by_form:
            by_form[_form(node)] = node_macs(node)
    return {node.name: by_form[_form(node)] for node in products}


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node; 0 for everything that is not a product.

    torch's own flop counter does the counting, on shapes alone.
    """
    if not _is_product(node):
        return 0
    arguments, options = fx.node.map_arg((node.args, dict(node.kwargs)), _on_meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        node.target(*arguments, **options)  # type: ignore[operator]
    return int(counter.get_total_flops()) // 2


def _on_meta(node: fx.Node) -> Any:
    value = node.meta["val"]
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _is_product(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in PRODUCTS


def _form(node: fx.Node) -> str:
    """An operation and the shapes that it is given."""
    return f"{node.target} {fx.node.map_arg((node.args, dict(node.kwargs)), _shape_text)}"


def _shape_text(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(value.shape) if isinstance(value, Tensor) else node.name
