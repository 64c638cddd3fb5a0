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
    return sum(node_macs(node) for node in graph.nodes)


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node; 0 for everything that is not a product.

    torch's own flop counter does the counting, on shapes alone.
    """
    if getattr(node.target, "overloadpacket", None) not in PRODUCTS:
        return 0
    arguments, options = fx.node.map_arg((node.args, dict(node.kwargs)), _on_meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        node.target(*arguments, **options)  # type: ignore[operator]
    return int(counter.get_total_flops()) // 2


def _on_meta(node: fx.Node) -> Any:
    value = node.meta["val"]
    return value.detach().to("meta") if isinstance(value, Tensor) else value
