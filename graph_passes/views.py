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
    found = node
    while node.target in VIEWS:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
        if isinstance(node.meta["val"], Tensor):  # a split gives a list, which no table holds
            found = node
    return found
