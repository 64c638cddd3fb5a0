"""Views as reshapes: ONNX has no strides that could forbid one."""

from __future__ import annotations

import torch
from torch import fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes

aten = torch.ops.aten
STRIDED = (aten.view.default, aten._unsafe_view.default)


def _reshape(node: fx.Node, new: NewNodes) -> fx.Node | None:
    return new.call(aten.reshape.default, *node.args) if _is_strided(node) else None


def _is_strided(node: fx.Node) -> bool:
    return node.target in STRIDED


# A copy in which values may be written with other strides than torch gave them.
views_to_reshapes = Lowering(lambda: _reshape, _is_strided)
