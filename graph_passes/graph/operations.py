"""Views: nodes that only look at another value."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

aten = torch.ops.aten
VIEWS = {
    operator.getitem,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.t.default,
    aten.diagonal.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.expand.default,
    aten.transpose.int,
    aten.permute.default,
}


def before_views(node: fx.Node) -> fx.Node:
    """The tensor that a value is a view of: one table for it serves all its views."""
    tensor = node
    while node.target in VIEWS:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
        if isinstance(node.meta["val"], Tensor):  # a split gives a list, which no table holds
            tensor = node
    return tensor


ATTENTION = aten.scaled_dot_product_attention.default


LINEAR = aten.linear.default


ADD = aten.add.Tensor


DATA_MOVEMENT = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.to.dtype,
        aten._to_copy.default,
    }
)


MATRIX_PRODUCTS = frozenset({aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.einsum})
