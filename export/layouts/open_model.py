"""One model for all sizes, from the models of a few: what differs between them is the sizes.

Exports for other sizes are walked side by side. Shapes, lists of sizes and tables that grow with
an open size are written in terms of it; anything else that differs is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from calicache.export.artifact.open_sizes import Sizes, fitted_formula
from calicache.export.artifact.weights import same_content
from calicache.export.layouts.open_values import OpenValues
from calicache.graph_passes.common.errors import ExportError


def open_model(models: Sequence[ir.Model], points: Sequence[Sizes]) -> ir.Model:
    """The first model, changed in place into one for all sizes.

    Args:
        models: of every point.
        points: the open sizes that each is for, as `fitted_formula` wants them.

    Raises:
        ExportError: an operation differs in more than sizes that the open ones give.
    """
    graphs = [model.graph for model in models]
    check_counts(graphs)
    _Walk(OpenValues(graphs, points), points).graphs(graphs)
    return models[0]


def check_counts(graphs: Sequence[ir.Graph]) -> None:
    """Refuse graphs of other numbers of inputs or operations.

    Raises:
        ExportError: there is one.
    """
    for graph in graphs[1:]:
        if (len(graph.inputs), len(graph)) != (len(graphs[0].inputs), len(graphs[0])):
            name = graphs[0].name or "graph"
            raise _refused(name, f"{len(graphs[0])} operations", f"{len(graph)}")


class _Walk:
    """Graphs side by side.

    Args:
        values: makes what depends on the open sizes.
        points: the open sizes of every graph.
    """

    def __init__(self, values: OpenValues, points: Sequence[Sizes]) -> None:
        self._values, self._points = values, points
        self._twins: dict[int, ir.Value] = {}  # values of the first graph by those of the others

    def graphs(self, graphs: Sequence[ir.Graph]) -> None:
        """Open one graph and those inside it."""
        check_counts(graphs)
        for inputs in zip(*(graph.inputs for graph in graphs), strict=True):
            self._pair(inputs)
        for nodes in zip(*(list(graph) for graph in graphs), strict=True):
            self._nodes(nodes)
        for outputs in zip(*(graph.outputs for graph in graphs), strict=True):
            if not self._are_twins(outputs):
                raise _refused(str(outputs[0].name), "the same result at all sizes", "another")

    def _pair(self, values: Sequence[ir.Value]) -> None:
        first, *others = values
        self._twins |= {id(other): first for other in others}
        shapes = [value.shape for value in values if value.shape is not None]
        if len(shapes) == len(values) and any(shape != shapes[0] for shape in shapes):
            first.shape = self._shape(str(first.name), shapes)

    def _are_twins(self, values: Sequence[ir.Value]) -> bool:
        return all(self._twins.get(id(other)) is values[0] for other in values[1:])

    def _shape(self, name: str, shapes: Sequence[ir.Shape]) -> ir.Shape:
        for shape in shapes:
            if len(shape) != len(shapes[0]):
                raise _refused(name, f"{len(shapes[0])} dimensions", str(len(shape)))
        return ir.Shape([self._size(sizes) for sizes in zip(*shapes, strict=True)])

    def _size(self, sizes: Sequence[object]) -> int | str | None:
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) < len(sizes):
            return None
        formula = fitted_formula(numbers, self._points)
        if formula is None:
            return None
        return str(formula) if formula.axes else numbers[0]

    def _nodes(self, nodes: Sequence[ir.Node]) -> None:
        first, name = nodes[0], str(nodes[0].outputs[0].name)
        for node in nodes[1:]:
            if (node.domain, node.op_type) != (first.domain, first.op_type):
                raise _refused(name, first.op_type, node.op_type)
            if (len(node.inputs), len(node.outputs)) != (len(first.inputs), len(first.outputs)):
                raise _refused(name, f"{len(first.outputs)} results", f"{len(node.outputs)}")
        for place, values in enumerate(zip(*(node.inputs for node in nodes), strict=True)):
            self._argument(first, place, values)
        for key, attribute in first.attributes.items():
            self._attribute(name, attribute, [node.attributes.get(key) for node in nodes[1:]])
        for outputs in zip(*(node.outputs for node in nodes), strict=True):
            self._pair(outputs)

    def _attribute(self, name: str, first: ir.Attr, others: Sequence[ir.Attr | None]) -> None:
        kept = [other for other in others if other is not None and other.type is first.type]
        if len(kept) < len(others):
            raise _refused(name, f"{first.name} {first.value}", "none")
        if first.type is ir.AttributeType.GRAPH:
            self.graphs([attribute.as_graph() for attribute in (first, *kept)])
        elif first.type is ir.AttributeType.TENSOR:
            if not all(same_content(first.as_tensor(), other.as_tensor()) for other in kept):
                raise _refused(name, f"the same {first.name} at all sizes", "another")
        else:
            for other in kept:
                if other.value != first.value:
                    raise _refused(name, f"{first.name} {first.value}", str(other.value))

    def _argument(self, node: ir.Node, place: int, values: Sequence[ir.Value | None]) -> None:
        name, known = str(node.outputs[0].name), [v for v in values if v is not None]
        if len(known) < len(values):
            if known:
                raise _refused(name, "the same arguments at all sizes", "one more")
            return
        tensors = [value.const_value for value in known if value.const_value is not None]
        if len(tensors) < len(known):
            if not self._are_twins(known):
                raise _refused(name, f"argument {known[0].name}", "another")
            return
        first, *others = tensors
        for other in others:
            if other is not first and not same_content(first, other):
                value = self._reshaped(node, place, tensors)
                value = value or self._values.grown(str(known[0].name), tensors)
                if value is None:
                    raise _refused(name, _words(first), _words(other))
                node.replace_input_with(place, value)
                return

    def _reshaped(
        self, node: ir.Node, place: int, tensors: Sequence[ir.TensorProtocol]
    ) -> ir.Value | None:
        """The sizes of a Reshape where one is what is left over: no runtime computes them."""
        if node.op_type != "Reshape" or place != 1:
            return None
        lists = [tensor.numpy() for tensor in tensors]
        if any(sizes.shape != lists[0].shape or (sizes < 0).any() for sizes in lists):
            return None
        differs = np.any([sizes != lists[0] for sizes in lists], axis=0)
        if differs.sum() != 1:
            return None
        return self._values.constant(np.where(differs, -1, lists[0]), "sizes")


def _words(tensor: ir.TensorProtocol) -> str:
    if tensor.size <= 8:  # a list of sizes
        return f"{np.asarray(tensor.numpy()).tolist()}"
    return f"a table {tuple(tensor.shape.numpy())} of other values"


def _refused(where: str, expected: str, got: str) -> ExportError:
    return ExportError(
        f"dynamic: {where}",
        expected=f"{expected}, or what grows with the open sizes",
        got=f"{got} at another",
        fix="This operation is made for one size: leave it out of dynamic, and export an artifact "
        "for every size that you need (optimized.for_call).",
    )
