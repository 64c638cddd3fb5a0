"""Multiply-accumulates of ONNX operators, from the shapes of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType

import onnx_ir as ir

Shape = tuple[int, ...]
Counter = Callable[[ir.Node, Sequence[Shape | None], Shape], int | None]

# Products without a formula here: what they cost is unknown, and said to be.
UNCOUNTED = frozenset(
    {
        "Einsum",
        "FusedMatMul",
        "FusedConv",
        "GroupQueryAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "DeformConv",
        "QLinearMatMul",
        "QLinearConv",
        "MatMulInteger",
        "ConvInteger",
        "MatMulNBits",
        "GRU",
        "LSTM",
        "RNN",
    }
)


def node_macs(node: ir.Node) -> int | None:
    """Multiply-accumulates of one run of a node; 0 for what is no product, None if unknown.

    A node with graphs inside (`If`, `Loop`) counts as 0: the graphs are counted by themselves.
    """
    if node.op_type in UNCOUNTED:
        return None
    count = _COUNTERS.get(node.op_type)
    if count is None:
        return 0
    result = _shape(node.outputs[0])
    shapes = [_shape(value) for value in node.inputs]
    if result is None or len(shapes) < 2 or shapes[0] is None or shapes[1] is None:
        return None
    return count(node, shapes, result)


def _shape(value: ir.Value | None) -> Shape | None:
    """The shape, where all of it is known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())


def _matmul(_: ir.Node, shapes: Sequence[Shape | None], result: Shape) -> int:
    assert shapes[0] is not None
    return prod(result) * shapes[0][-1]


def _gemm(node: ir.Node, shapes: Sequence[Shape | None], result: Shape) -> int:
    assert shapes[0] is not None
    return prod(result) * shapes[0][0 if node.attributes.get_int("transA", 0) else 1]


def _convolution(_: ir.Node, shapes: Sequence[Shape | None], result: Shape) -> int:
    assert shapes[1] is not None
    return prod(result) * prod(shapes[1][1:])  # weights (out, in / groups, *kernel)


def _transposed_convolution(_: ir.Node, shapes: Sequence[Shape | None], __: Shape) -> int:
    assert shapes[0] is not None
    assert shapes[1] is not None
    return prod(shapes[0]) * prod(shapes[1][1:])  # weights (in, out / groups, *kernel)


def _multi_head_attention(_: ir.Node, shapes: Sequence[Shape | None], result: Shape) -> int | None:
    """S L (H + V) for each of the batch: query (B, S, H), key (B, L, H), result (B, S, V)."""
    query, key = shapes[:2]
    if len(shapes) < 3 or shapes[2] is None or query is None or key is None:
        return None
    if {len(query), len(key), len(shapes[2])} != {3}:
        return None  # packed, or split into heads: not told apart here
    batch, rows, channels = query
    return batch * rows * key[1] * (channels + result[-1])


def _attention(node: ir.Node, shapes: Sequence[Shape | None], result: Shape) -> int | None:
    """Q (B, heads, S, D), K (B, heads, L, D), result (B, heads, S, V), of opset 23."""
    query, key = shapes[:2]
    past = any(value is not None for value in node.inputs[4:])
    if node.domain or past or query is None or key is None or {len(query), len(key)} != {4}:
        return None
    batch, heads, rows, depth = query
    return batch * heads * rows * key[2] * (depth + result[-1])


_COUNTERS: Mapping[str, Counter] = MappingProxyType(
    {
        "MatMul": _matmul,
        "Gemm": _gemm,
        "Conv": _convolution,
        "ConvTranspose": _transposed_convolution,
        "MultiHeadAttention": _multi_head_attention,
        "Attention": _attention,
    }
)
