"""Attention masks that leave a token nothing to look at: zeros in torch, NaN in ONNX.

Padding masks on both sides do this to the padding's own rows. Such rows are let look at all and
are set to zero afterwards, as torch has them.
"""

from __future__ import annotations

import torch
from torch import fx

from calicache.graph_passes.graph.operations import ATTENTION
from calicache.graph_passes.graph.surgery import copy_graph, finish

aten = torch.ops.aten


def guard_empty_rows(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which no row of a truth-valued attention mask is empty.

    Args:
        module: nodes describe their values; it is not changed.
    """
    graph, _ = copy_graph(module.graph)
    guarded: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in list(graph.nodes):
        mask = _mask(node)
        if mask is None:
            continue
        if mask not in guarded:
            with graph.inserting_after(mask):
                guarded[mask] = _guard(mask)
        full, empty = guarded[mask]
        node.replace_input_with(mask, full)
        with graph.inserting_after(node):
            filled = graph.call_function(aten.masked_fill.Scalar, (node, empty, 0.0))
        filled.meta = dict(node.meta)
        node.replace_all_uses_with(filled, delete_user_cb=lambda user, own=filled: user is not own)
    return fx.GraphModule(module, finish(graph))


def _mask(node: fx.Node) -> fx.Node | None:
    """The truth-valued mask of an attention."""
    if node.target is not ATTENTION:
        return None
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    boolean = isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool
    return mask if boolean and isinstance(mask, fx.Node) else None


def _guard(mask: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(the mask with empty rows full, which rows are empty (..., N, 1))."""
    graph, value = mask.graph, mask.meta["val"]
    some = graph.call_function(aten.any.dim, (mask, -1, True))
    with graph.inserting_after(some):
        empty = graph.call_function(aten.logical_not.default, (some,))
    with graph.inserting_after(empty):
        full = graph.call_function(aten.logical_or.default, (mask, empty))
    some.meta["val"] = empty.meta["val"] = value.new_empty((*value.shape[:-1], 1))
    full.meta["val"] = value
    return full, empty
