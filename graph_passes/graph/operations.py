"""Operations by kind, and the three of calibration branches in integers."""

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


ROW_LEVELS = 127  # of an increment, to both sides of 0
ZERO_LEVEL = 128  # of 8 bits without a sign, which is what ONNX Runtime has fast kernels for
LEAST_SCALE = 1e-30  # an increment of nothing but zeros is divided by it


def token_scales(rows: Tensor) -> Tensor:
    """What one level of every token stands for: the largest magnitude is 127 of them.

    Args:
        rows: float32 (T, C).

    Returns:
        float32 (T, 1).
    """
    return (rows.abs().amax(-1, keepdim=True) * (1 / ROW_LEVELS)).clamp_min(LEAST_SCALE)


def quantise(rows: Tensor, scales: Tensor) -> Tensor:
    """Rows in levels of their tokens' scales, rounded to the nearest and from ties to even.

    Args:
        rows: float32 (T, C).
        scales: float32 (T, 1).

    Returns:
        uint8 (T, C), 128 being zero.
    """
    return ((rows / scales).round() + ZERO_LEVEL).to(torch.uint8)


def quantised_product(
    levels: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor
) -> Tensor:
    """The product of rows and a weight, both in levels.

    Torch multiplies 8-bit integers 28 times slower than float32 on processors without
    instructions for them, so it is taken in float32 there; in ONNX it is one of integers.

    Args:
        levels: uint8 (T, in), 128 being zero.
        scales: float32 (T, 1).
        weight: int8 (in, out).
        weight_scales: float32 (out,).

    Returns:
        float32 (T, out).
    """
    sums = (levels.float() - ZERO_LEVEL) @ weight.float()
    return sums * weight_scales * scales
