"""Tiny numbers that guard a division, kept from the optimizer that takes them for zero.

onnxscript drops an addend within 1e-8 of zero; 1 / (x + 1e-15) is then 1 / 0 where x is 0. The sum
is written at another scale, a power of two, which changes no bit of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes

aten = torch.ops.aten
TAKEN_FOR_ZERO, SCALE = 1e-7, 2.0**40


def _at_another_scale(node: fx.Node, new: NewNodes) -> fx.Node | None:
    if not _adds_a_tiny_number(node):
        return None
    source, tiny = node.args
    large = new.call(aten.mul.Tensor, source, SCALE)
    total = new.call(aten.add.Tensor, large, tiny * SCALE)  # type: ignore[operator]
    return new.call(aten.mul.Tensor, total, 1.0 / SCALE)


def _adds_a_tiny_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    wide = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
    plain = node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs
    term = node.args[1] if plain else None
    return wide and isinstance(term, float) and 0 < abs(term) < TAKEN_FOR_ZERO


# A copy in which x + tiny is (x 2^40 + tiny 2^40) 2^-40.
scale_small_terms = Lowering(lambda: _at_another_scale, _adds_a_tiny_number)
