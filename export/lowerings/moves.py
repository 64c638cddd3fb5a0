"""Moves that lead back to where a value was: pairs of transposes, and chains of reshapes.

Fused attention wants heads side by side, as they were before the model split them.
"""

from __future__ import annotations

import torch
from torch import fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes
from calicache.graph_passes.graph.surgery import shape_of

aten = torch.ops.aten


def _is_move(node: fx.Node) -> bool:
    return node.target in (aten.transpose.int, aten.reshape.default)


def _cancel(node: fx.Node, new: NewNodes) -> fx.Node | None:
    if not _is_move(node):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.target is aten.transpose.int:
        undone = source.target is node.target and _dims(source) == _dims(node)
        return source.all_input_nodes[0] if undone else None
    while source.target is node.target:
        source = source.all_input_nodes[0]
    if shape_of(source) == shape_of(node):
        return source
    return None if source is node.args[0] else new.call(node.target, source, list(shape_of(node)))


def _dims(transpose: fx.Node) -> set[int]:
    rank = len(shape_of(transpose))
    return {int(dim) % rank for dim in transpose.args[1:]}  # type: ignore[arg-type]


# A copy in which no transpose undoes another, and no reshape follows a reshape.
cancel_moves = Lowering(lambda: _cancel, _is_move)
