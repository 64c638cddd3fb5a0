"""Numbers of float64 operations as tensors: torch.onnx writes plain ones as float32.

`0.8 * x` of a float64 x would come out as 0.800000011920929 x.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes

aten = torch.ops.aten

# Operations on numbers, as the same on tensors.
ON_TENSORS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.rsub.Scalar: aten.rsub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
    aten.clamp.default: aten.clamp.Tensor,
    aten.clamp_min.default: aten.clamp_min.Tensor,
    aten.clamp_max.default: aten.clamp_max.Tensor,
    aten.masked_fill.Scalar: aten.masked_fill.Tensor,
    aten.lerp.Scalar: aten.lerp.Tensor,
    aten.where.ScalarSelf: aten.where.self,
    aten.where.ScalarOther: aten.where.self,
}
TENSOR_TYPES = ("Tensor", "Optional[Tensor]")
CUBE, ROOT = 0.044715, math.sqrt(2 / math.pi)  # of GELU by tanh


def _exact(node: fx.Node, new: NewNodes) -> fx.Node | None:
    if not _is_double(node):
        return None
    if node.target is aten.gelu.default:
        return _gelu(node, new)
    alpha = node.kwargs.get("alpha")
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and _is_inexact(alpha):
        first, second = node.args
        assert isinstance(second, fx.Node)
        scaled = new.call(
            aten.mul.Tensor, second, _number(node, new, alpha), value=second.meta["val"]
        )
        return new.call(node.target, first, scaled)
    return _on_tensors(node, new)


def _on_tensors(node: fx.Node, new: NewNodes) -> fx.Node | None:
    """The operation on tensors that hold its numbers; None where float32 holds them all."""
    target: Any = ON_TENSORS.get(node.target, node.target)  # type: ignore[call-overload]
    if not any(map(_is_inexact, node.args)):
        return None
    arguments = [
        _number(node, new, value)
        if isinstance(value, float) and str(parameter.type) in TENSOR_TYPES
        else value
        for value, parameter in zip(node.args, target._schema.arguments, strict=False)
    ]
    return new.call(target, *arguments, options=dict(node.kwargs))


def _gelu(node: fx.Node, new: NewNodes) -> fx.Node:
    """GELU written out: the numbers inside of it are torch.onnx's own."""
    x = node.args[0]

    def times(value: object, number: float) -> fx.Node:
        return new.call(aten.mul.Tensor, value, _number(node, new, number))

    if node.kwargs.get("approximate", "none") == "tanh":
        cube = new.call(aten.mul.Tensor, new.call(aten.mul.Tensor, x, x), x)
        inner = times(new.call(aten.add.Tensor, x, times(cube, CUBE)), ROOT)
        bent = new.call(aten.tanh.default, inner)
    else:
        bent = new.call(aten.erf.default, times(x, math.sqrt(0.5)))
    share = new.call(aten.mul.Tensor, new.call(aten.add.Tensor, bent, 1.0), 0.5)
    return new.call(aten.mul.Tensor, x, share)


def _number(node: fx.Node, new: NewNodes, number: Any) -> fx.Node:
    value = torch.tensor(number, dtype=torch.float64)
    place = len(new.tensors.fresh)
    return new.tensor(f"numbers.{node.name}_{place}", value, value)


def _is_double(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return value.dtype is torch.float64


def _is_inexact(value: object) -> bool:
    """Whether float32 does not hold a number."""
    return (
        isinstance(value, float)
        and math.isfinite(value)
        and float(torch.tensor(value, dtype=torch.float32)) != value
    )


# A copy in which float64 operations have their numbers in float64.
widen_numbers = Lowering(lambda: _exact, _is_double)
