"""Squeezes of a dimension that is not 1: nothing in torch, an error in ONNX."""

from __future__ import annotations

import torch
from torch import fx

from calicache.graph_passes.graph.surgery import copy_graph, finish, shape_of

aten = torch.ops.aten


def drop_empty_squeezes(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which every squeeze takes a dimension of size 1 away."""
    graph, _ = copy_graph(module.graph)
    for node in graph.nodes:
        if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
            continue
        source, given = node.args[:2]
        assert isinstance(source, fx.Node)
        shape = shape_of(source)
        wanted = given if isinstance(given, list | tuple) else [given]
        ones = [int(dim) for dim in wanted if shape and shape[int(dim)] == 1]
        if len(ones) == len(wanted):
            continue
        if ones:
            node.target, node.args = aten.squeeze.dims, (source, ones)
        else:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    return fx.GraphModule(module, finish(graph))
