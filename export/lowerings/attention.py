"""Attention as the one operator that ONNX Runtime runs fused, or as products that all have.

`com.microsoft.MultiHeadAttention` has kernels on the CPU and on CUDA. It takes heads side by side
as (B, N, H d), the form that they have before a model splits them, so the transposes on both
sides cancel out when ONNX Runtime loads the graph. Other runtimes know MatMul and Softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calicache.export.artifact.manifest import Attention
from calicache.export.lowerings.rewriting import Lowering, NewNodes, Rule
from calicache.graph_passes.graph.operations import ATTENTION

aten = torch.ops.aten
KERNELS = (torch.float32, torch.float16, torch.bfloat16)  # dtypes that the operator is defined for


Call = Mapping[str, Any]


def _rule(write: Callable[[Call, NewNodes], fx.Node]) -> Rule:
    def rule(node: fx.Node, new: NewNodes) -> fx.Node | None:
        if node.target is not ATTENTION:
            return None
        call = _arguments(node)
        return write(call, new) if _fits(call) else None

    return rule


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an attention by name, defaults included."""
    schema = ATTENTION._schema.arguments
    call = {argument.name: argument.default_value for argument in schema}
    call |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return call | dict(node.kwargs)


def _fits(call: Call) -> bool:
    query, key, value = (call[name].meta["val"].shape for name in ("query", "key", "value"))
    if call["query"].meta["val"].dtype not in KERNELS:
        return False
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


def _fused(call: Call, new: NewNodes) -> fx.Node:
    """One attention as transposes, the operator, and a transpose back."""
    value: Tensor = new.place.meta["val"]  # (B, H, N, dv)
    split = value.transpose(1, 2)
    flat = split.flatten(2)
    inputs: list[fx.Node | None]
    inputs = [_side_by_side(call[name], new) for name in ("query", "key", "value")]
    if call["attn_mask"] is not None:
        inputs += [None, None, _bias(call["attn_mask"], value.dtype, new)]
    attributes: dict[str, int | float]
    attributes = {"num_heads": value.shape[1], "unidirectional": call["is_causal"]}
    if call["scale"] is not None:
        attributes["scale"] = call["scale"]
    mixed = new.call(
        torch.onnx.ops.symbolic,
        "com.microsoft::MultiHeadAttention",
        inputs,
        attributes,
        options={"dtype": value.dtype, "shape": tuple(flat.shape), "version": 1},
        value=flat,
    )
    parts = new.call(aten.reshape.default, mixed, list(split.shape), value=split)
    return new.call(aten.transpose.int, parts, 1, 2)


def _side_by_side(source: fx.Node, new: NewNodes) -> fx.Node:
    """(B, H, N, d) to (B, N, H d)."""
    turned = source.meta["val"].transpose(1, 2)
    flat = turned.flatten(2)
    turn = new.call(aten.transpose.int, source, 1, 2, value=turned)
    return new.call(aten.reshape.default, turn, list(flat.shape), value=flat)


def _bias(mask: fx.Node, dtype: torch.dtype, new: NewNodes) -> fx.Node:
    """What the mask adds to the scores, (1 or B, 1 or H, N, M)."""
    form = mask.meta["val"]
    if form.dtype is not torch.bool:
        return mask
    zeros = form.new_zeros(form.shape, dtype=dtype)
    outside = new.call(aten.logical_not.default, mask, value=form)
    bias = new.call(aten.zeros_like.default, mask, options={"dtype": dtype}, value=zeros)
    return new.call(aten.masked_fill.Scalar, bias, outside, -math.inf, value=zeros)


def _products(call: Call, new: NewNodes) -> fx.Node:
    """One attention as softmax(q k^T scale + bias) v."""
    query, key, value = call["query"], call["key"], call["value"]
    form: Tensor = query.meta["val"]
    turned = key.meta["val"].transpose(2, 3)
    scores = form.new_empty((*form.shape[:3], turned.shape[3]))
    scale = call["scale"] or form.shape[3] ** -0.5
    scaled = new.call(aten.mul.Tensor, query, scale, value=form)
    keys = new.call(aten.transpose.int, key, 2, 3, value=turned)
    logits = new.call(aten.matmul.default, scaled, keys, value=scores)
    for bias in _biases(call, scores, new):
        logits = new.call(aten.add.Tensor, logits, bias, value=scores)
    shares = new.call(aten.softmax.int, logits, -1, value=scores)
    return new.call(aten.matmul.default, shares, value)


def _biases(call: Call, scores: Tensor, new: NewNodes) -> list[fx.Node]:
    """What is added to the scores before they become shares."""
    if call["is_causal"]:
        sizes = scores.shape[2:]
        later = torch.full(sizes, -math.inf, dtype=scores.dtype).triu(1)
        return [new.tensor(f"causal.{new.place.name}", later, value=scores.new_empty(sizes))]
    mask = call["attn_mask"]
    return [] if mask is None else [_bias(mask, scores.dtype, new)]


# A copy with every attention that the operator can take handed to it.
#
# Left alone are float64, grouped queries, dropout, other than four dimensions, masks that broadcast
# over queries or keys, and causal attention between sequences of two lengths. The result is for
# torch.onnx alone: torch cannot run the operator.
fuse_attention = Lowering(lambda: _rule(_fused), lambda node: node.target is ATTENTION)

# A copy with the same ones as products, for which torch.onnx would turn the keys in three moves.
split_attention = Lowering(lambda: _rule(_products), lambda node: node.target is ATTENTION)

ATTENTIONS = {Attention.FUSED: fuse_attention, Attention.STANDARD: split_attention}
