"""Hoisting: what is the same at every step of a run is computed once, before the loops.

An exact pass over a finished model. ONNX Runtime does not move nodes out of loop bodies, so a
text projection or a label embedder would run again at every step.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass


class HoistInvariants(ir.passes.InPlacePass):
    """Move nodes that no loop variable reaches in front of the loop that holds them.

    Nodes that make a result of their own graph stay, since a graph has to compute its results.
    Equal nodes that several variants held are merged.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Hoist; `modified` tells whether anything moved or was merged."""
        moved = False
        for node in list(model.graph):
            if node.op_type != "Loop":
                continue
            varying: set[int] = set()
            for inner in _movable(node.attributes["body"].as_graph(), varying):
                owner = inner.graph
                assert isinstance(owner, ir.Graph)
                owner.remove(inner)
                model.graph.insert_before(node, inner)
                moved = True
        merged = CommonSubexpressionEliminationPass()(model)
        return ir.passes.PassResult(model, modified=moved or merged.modified)


def _movable(graph: ir.Graph, varying: set[int]) -> Iterator[ir.Node]:
    """Nodes of a graph and those inside it that depend on nothing varying, in graph order.

    Args:
        graph: a body of a `Loop`, or a branch inside one.
        varying: ids of the values that change with the loops; grows on the way.
    """
    varying.update(id(value) for value in graph.inputs)
    results = {id(value) for value in graph.outputs}
    for node in list(graph):
        inner = [a.as_graph() for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH]
        for part in inner:
            yield from _movable(part, varying)
        fixed = not any(id(value) in varying for value in node.inputs)
        if fixed and not inner and not any(id(value) in results for value in node.outputs):
            yield node
        else:
            varying.update(id(value) for value in node.outputs)
