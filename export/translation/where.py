"""Choices between truth values, in the logic that ONNX Runtime's CPU provider has for them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience


def lower_boolean_where(model: ir.Model) -> ir.Model:
    """Write where(c, a, b) of truth values as (c and a) or (not c and b), in place."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        value = node.outputs[0]
        if node.op_type != "Where" or value.dtype != ir.DataType.BOOL:
            continue
        graph = node.graph
        assert graph is not None
        condition, yes, no = node.inputs
        first = ir.node("And", [condition, yes])
        negated = ir.node("Not", [condition])
        second = ir.node("And", [negated.outputs[0], no])
        either = ir.node("Or", [first.outputs[0], second.outputs[0]])
        either.outputs[0].type, either.outputs[0].shape = value.type, value.shape
        new = [first, negated, second, either]
        convenience.replace_nodes_and_values(graph, node, [node], new, [value], [either.outputs[0]])
    return model
