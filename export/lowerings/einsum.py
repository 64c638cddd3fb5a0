"""Einsums that only reorder dimensions, as transposes: ONNX's Einsum takes no bfloat16.

Diffusion transformers put their patches back together with one.
"""

from __future__ import annotations

import torch
from torch import fx

from calicache.graph_passes.graph.surgery import copy_graph

aten = torch.ops.aten


def lower_einsum(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every `abc->cab` of one operand as a permute; others are left alone.

    Args:
        module: nodes describe their values; it is not changed.
    """
    graph, copies = copy_graph(module.graph)
    for node in module.graph.nodes:
        order = _order(node)
        if order is None:
            continue
        (source,) = node.args[1]
        old = copies[node.name]
        with graph.inserting_before(old):
            new = graph.call_function(aten.permute.default, (copies[source.name], order))
        new.meta = dict(node.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    return fx.GraphModule(module, graph, class_name=type(module).__name__)


def _order(node: fx.Node) -> list[int] | None:
    """Where every dimension of the result comes from, if the node only reorders them."""
    if node.target is not aten.einsum.default or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    before, arrow, after = str(node.args[0]).replace(" ", "").partition("->")
    letters = before.isalpha() and len(set(before)) == len(before)
    if not (arrow and letters and sorted(before) == sorted(after)):
        return None
    return [before.index(letter) for letter in after]
