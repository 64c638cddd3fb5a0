"""Einsums that only reorder dimensions, as transposes: ONNX's Einsum takes no bfloat16.

Diffusion transformers put their patches back together with one.
"""

from __future__ import annotations

import torch
from torch import fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes

aten = torch.ops.aten


def _permute(node: fx.Node, new: NewNodes) -> fx.Node | None:
    order = _order(node)
    if order is None:
        return None
    return new.call(aten.permute.default, node.all_input_nodes[0], order)


def _order(node: fx.Node) -> list[int] | None:
    """Where every dimension of the result comes from, if the node only reorders them."""
    if node.target is not aten.einsum.default or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    before, arrow, after = str(node.args[0]).replace(" ", "").partition("->")
    letters = before.isalpha() and len(set(before)) == len(before)
    if not (arrow and letters and sorted(before) == sorted(after)):
        return None
    return [before.index(letter) for letter in after]


# A copy with every `abc->cab` of one operand as a permute; others are left alone.
lower_einsum = Lowering(lambda: _permute, lambda node: _order(node) is not None)
