"""Scattered sums in half precision, taken in float32: ONNX Runtime's CPU provider has no others.

Such a model opens and fails when it is run. A sum in float32 is rounded once, where torch rounds
after every term.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
SCATTERS = ("ScatterElements", "ScatterND")


def widen_scattered_sums(model: ir.Model) -> ir.Model:
    """Write scattered sums and products of half precision with casts around them, in place."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        result = node.outputs[0]
        if node.op_type not in SCATTERS or result.dtype not in HALF:
            continue
        if node.attributes.get_string("reduction", "none") not in ("add", "mul"):
            continue
        graph, (data, places, updates) = node.graph, node.inputs
        assert graph is not None
        assert data is not None
        assert updates is not None
        into, terms = (_cast(value, ir.DataType.FLOAT) for value in (data, updates))
        sums = ir.node(
            node.op_type, [into.outputs[0], places, terms.outputs[0]], dict(node.attributes)
        )
        sums.outputs[0].type, sums.outputs[0].shape = into.outputs[0].type, result.shape
        back = _cast(sums.outputs[0], result.dtype)
        new = [into, terms, sums, back]
        convenience.replace_nodes_and_values(graph, node, [node], new, [result], [back.outputs[0]])
    return model


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": dtype})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    return cast
