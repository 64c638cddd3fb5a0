"""Values that depend on no input, made once: also those whose operations ONNX does not have."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.graph.dependence import is_random
from calicache.graph_passes.graph.operations import VIEWS
from calicache.graph_passes.graph.surgery import copy_graph, finish, read_attribute

LARGEST = 1 << 20  # elements; a larger one could be a second copy of a weight


def fold_constants(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which tensors made from weights and numbers alone are weights themselves.

    Views stay where they are, so that no weight is stored twice; so do large values.
    """
    graph, _ = copy_graph(module.graph)
    values: dict[Any, Any] = {}
    tables: dict[str, Tensor | fx.GraphModule] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tables[str(node.target)] = read_attribute(module, str(node.target))
            values[node] = tables[str(node.target)]
        elif _is_constant(node, values):
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.get)
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            values[node] = value
            if isinstance(value, Tensor) and value.numel() <= LARGEST and not _is_view(node):
                name = f"folded.{node.name}"
                tables[name] = value.detach().clone()
                with graph.inserting_before(node):
                    folded = graph.get_attr(name)
                folded.meta = dict(node.meta)
                values[folded] = tables[name]
                node.replace_all_uses_with(folded)
    return fx.GraphModule(tables, finish(graph))


def _is_view(node: fx.Node) -> bool:
    """Whether a node looks at a weight; an item of what another operation made does not."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0].target in VIEWS
    return node.target in VIEWS


def _is_constant(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    sources = node.all_input_nodes
    return node.op == "call_function" and not is_random(node) and all(n in values for n in sources)
