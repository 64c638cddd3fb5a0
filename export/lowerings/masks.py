"""Attention masks that leave a token nothing to look at: zeros in torch, NaN in ONNX.

Padding masks on both sides do this to the padding's own rows. Such rows are let look at all and
are set to zero afterwards, as torch has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes
from calicache.graph_passes.graph.operations import ATTENTION

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Guard:
    """A mask with its empty rows full, and which rows are empty (..., N, 1)."""

    full: fx.Node
    empty: fx.Node


@dataclass(frozen=True, slots=True)
class _GuardRows:
    """The rule; all attentions under one mask share its guard."""

    guards: dict[fx.Node, _Guard] = field(default_factory=dict)

    def __call__(self, node: fx.Node, new: NewNodes) -> fx.Node | None:
        mask = _truth_mask(node)
        if mask is None:
            return None
        if mask not in self.guards:
            self.guards[mask] = _guard(mask, new)
        guard = self.guards[mask]
        arguments = [guard.full if argument is mask else argument for argument in node.args]
        options = {n: guard.full if value is mask else value for n, value in node.kwargs.items()}
        attended = new.call(ATTENTION, *arguments, options=options)
        return new.call(aten.masked_fill.Scalar, attended, guard.empty, 0.0)


def _truth_mask(node: fx.Node) -> fx.Node | None:
    """The truth-valued mask of an attention."""
    if node.target is not ATTENTION:
        return None
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    boolean = isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool
    return mask if boolean and isinstance(mask, fx.Node) else None


def _guard(mask: fx.Node, new: NewNodes) -> _Guard:
    value = mask.meta["val"]
    row = value.new_empty((*value.shape[:-1], 1))
    some = new.call(aten.any.dim, mask, -1, True, value=row)
    empty = new.call(aten.logical_not.default, some, value=row)
    return _Guard(new.call(aten.logical_or.default, mask, empty, value=value), empty)


# A copy in which no row of a truth-valued attention mask is empty.
guard_empty_rows = Lowering(_GuardRows, lambda node: _truth_mask(node) is not None)
