"""Squeezes of a dimension that is not 1: nothing in torch, an error in ONNX."""

from __future__ import annotations

import torch
from torch import fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes
from calicache.graph_passes.graph.surgery import shape_of

aten = torch.ops.aten
SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims)


def _squeeze_ones(node: fx.Node, new: NewNodes) -> fx.Node | None:
    if node.target not in SQUEEZES:
        return None
    source, named = node.args[:2]
    assert isinstance(source, fx.Node)
    shape = shape_of(source)
    dims = named if isinstance(named, list | tuple) else [named]
    ones = [int(dim) for dim in dims if shape and shape[int(dim)] == 1]  # type: ignore[arg-type]
    if len(ones) == len(dims):
        return None
    return new.call(aten.squeeze.dims, source, ones) if ones else source


# A copy in which every squeeze takes a dimension of size 1 away.
drop_empty_squeezes = Lowering(lambda: _squeeze_ones, lambda node: node.target in SQUEEZES)
