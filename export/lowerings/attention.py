"""Attention as the one operator that ONNX Runtime runs fused, not the products it is made of.

`com.microsoft.MultiHeadAttention` has kernels on the CPU and on CUDA. It takes heads side by side
as (B, N, H d), the form that they have before a model splits them, so the transposes on both
sides cancel out when ONNX Runtime loads the graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.graph.surgery import copy_graph

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


def fuse_attention(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every attention that the operator can take handed to it.

    Left alone are grouped queries, dropout, other than four dimensions, masks that broadcast
    over queries or keys, and causal attention between sequences of two lengths.

    Args:
        module: placeholders and nodes describe their values; it is not changed. The result is
            for torch.onnx.export alone: torch cannot run the operator.
    """
    graph, copies = copy_graph(module.graph)
    for node in module.graph.nodes:
        if node.target is ATTENTION:
            call = _arguments(node)
            if _fits(call):
                _replace(graph, copies[node.name], copies, call)
    return fx.GraphModule(module, graph, class_name=type(module).__name__)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an attention by name, defaults included."""
    schema = ATTENTION._schema.arguments
    call = {argument.name: argument.default_value for argument in schema}
    call |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return call | dict(node.kwargs)


def _fits(call: dict[str, Any]) -> bool:
    query, key, value = (call[name].meta["val"].shape for name in ("query", "key", "value"))
    if call["dropout_p"] or not len(query) == len(key) == len(value) == 4:
        return False
    if not query[:2] == key[:2] == value[:2]:
        return False
    if call["is_causal"] and query[2] != key[2]:
        return False
    mask = call["attn_mask"]
    if mask is None:
        return True
    shape = mask.meta["val"].shape
    return len(shape) == 4 and tuple(shape[2:]) == (query[2], key[2])


def _replace(
    graph: fx.Graph, node: fx.Node, copies: dict[str, fx.Node], call: dict[str, Any]
) -> None:
    """Write one attention as transposes, the operator, and a transpose back."""
    value: Tensor = node.meta["val"]  # (B, H, N, dv)
    batch, heads, tokens, width = value.shape

    def add(target: Any, *arguments: Any, like: Tensor, **options: Any) -> fx.Node:
        made = graph.call_function(target, arguments, options)
        made.meta = {**node.meta, "val": like}
        return made

    def side_by_side(source: fx.Node) -> fx.Node:
        """(B, H, N, d) to (B, N, H d)."""
        turned = source.meta["val"].transpose(1, 2)
        flat = turned.flatten(2)
        turn = add(aten.transpose.int, copies[source.name], 1, 2, like=turned)
        return add(aten.reshape.default, turn, list(flat.shape), like=flat)

    def bias(mask: fx.Node) -> fx.Node:
        """What the mask adds to the scores, (1 or B, 1 or H, N, M)."""
        own, form = copies[mask.name], mask.meta["val"]
        if form.dtype is not torch.bool:
            return own
        zeros = form.new_zeros(form.shape, dtype=value.dtype)
        outside = add(aten.logical_not.default, own, like=form)
        nothing = add(aten.zeros_like.default, own, dtype=value.dtype, like=zeros)
        return add(aten.masked_fill.Scalar, nothing, outside, -math.inf, like=zeros)

    with graph.inserting_before(node):
        inputs: list[fx.Node | None]
        inputs = [side_by_side(call[name]) for name in ("query", "key", "value")]
        if call["attn_mask"] is not None:
            inputs += [None, None, bias(call["attn_mask"])]
        options: dict[str, int | float] = {"num_heads": heads, "unidirectional": call["is_causal"]}
        if call["scale"] is not None:
            options["scale"] = call["scale"]
        mixed = add(
            torch.onnx.ops.symbolic,
            "com.microsoft::MultiHeadAttention",
            inputs,
            options,
            dtype=value.dtype,
            shape=(batch, tokens, heads * width),
            version=1,
            like=value.transpose(1, 2).flatten(2),
        )
        split = value.transpose(1, 2)
        parts = add(aten.reshape.default, mixed, list(split.shape), like=split)
        result = add(aten.transpose.int, parts, 1, 2, like=value)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
