"""One model for every batch, from the models of two: what differs between them is the batch.

Two exports for other batch sizes are walked side by side. Shapes, lists of sizes and tables that
grow with the batch are written in terms of it; anything else that differs is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from calicache.export.artifact.weights import same_content
from calicache.export.layouts.batch_values import BatchValues, size_in_batches
from calicache.graph_passes.common.errors import ExportError

BATCH = "batch"


def open_batch(one: ir.Model, two: ir.Model, sizes: tuple[int, int]) -> ir.Model:
    """The first model, changed in place into one for every batch.

    Args:
        one: for the first batch size.
        two: for the second.
        sizes: of the batch, in samples.

    Raises:
        ExportError: an operation differs in more than sizes that grow with the batch.
    """
    _Walk(BatchValues(one.graph, two.graph, sizes), sizes).graphs(one.graph, two.graph)
    return one


class _Walk:
    """Two graphs side by side.

    Args:
        values: makes what depends on the batch.
        sizes: of the batch.
    """

    def __init__(self, values: BatchValues, sizes: tuple[int, int]) -> None:
        self._values, self._sizes = values, sizes
        self._twins: dict[int, ir.Value] = {}

    def graphs(self, one: ir.Graph, two: ir.Graph) -> None:
        """Open one graph and those inside it."""
        if len(one.inputs) != len(two.inputs) or len(one) != len(two):
            raise _refused(one.name or "graph", f"{len(one)} operations", f"{len(two)} at another")
        self._pair(one.inputs, two.inputs)
        for first, second in zip(list(one), list(two), strict=True):
            self._nodes(first, second)
        for output, other in zip(one.outputs, two.outputs, strict=True):
            if self._twins.get(id(other)) is not output:
                raise _refused(str(output.name), "the same result at every batch", "another")

    def _pair(self, ones: Sequence[ir.Value], twos: Sequence[ir.Value]) -> None:
        for one, two in zip(ones, twos, strict=True):
            self._twins[id(two)] = one
            if one.shape is not None and two.shape is not None and one.shape != two.shape:
                one.shape = self._shape(one, two)

    def _shape(self, one: ir.Value, two: ir.Value) -> ir.Shape | None:
        assert one.shape is not None
        assert two.shape is not None
        if len(one.shape) != len(two.shape):
            raise _refused(str(one.name), f"{len(one.shape)} dimensions", str(len(two.shape)))
        return ir.Shape([self._size(a, b) for a, b in zip(one.shape, two.shape, strict=True)])

    def _size(self, one: object, two: object) -> int | str | None:
        if not isinstance(one, int) or not isinstance(two, int):
            return None
        if one == two:
            return one
        share = size_in_batches((one, two), self._sizes)
        if share is None:
            return None
        return BATCH if share == 1 else f"{share}*{BATCH}"

    def _nodes(self, one: ir.Node, two: ir.Node) -> None:
        name = str(one.outputs[0].name)
        if (one.domain, one.op_type) != (two.domain, two.op_type):
            raise _refused(name, one.op_type, two.op_type)
        if (len(one.inputs), len(one.outputs)) != (len(two.inputs), len(two.outputs)):
            raise _refused(name, f"{len(one.outputs)} results", f"{len(two.outputs)}")
        for place, pair in enumerate(zip(one.inputs, two.inputs, strict=True)):
            self._argument(one, place, *pair)
        self._attributes(name, one, two)
        self._pair(one.outputs, two.outputs)

    def _attributes(self, name: str, one: ir.Node, two: ir.Node) -> None:
        for key, attribute in one.attributes.items():
            other = two.attributes.get(key)
            if attribute.type is ir.AttributeType.GRAPH and other is not None:
                self.graphs(attribute.as_graph(), other.as_graph())
            elif attribute.type is ir.AttributeType.TENSOR and other is not None:
                if not same_content(attribute.as_tensor(), other.as_tensor()):
                    raise _refused(name, f"the same {key} at every batch", "another")
            elif other is None or attribute.value != other.value:
                raise _refused(name, f"{key} {attribute.value}", str(other and other.value))

    def _argument(
        self, node: ir.Node, place: int, one: ir.Value | None, two: ir.Value | None
    ) -> None:
        name = str(node.outputs[0].name)
        if one is None or two is None:
            if one is not two:
                raise _refused(name, "the same arguments at every batch", "one more")
            return
        tensor, other = one.const_value, two.const_value
        if tensor is None or other is None:
            if self._twins.get(id(two)) is not one:
                raise _refused(name, f"argument {one.name}", str(two.name))
        elif tensor is not other and not same_content(tensor, other):
            value = _reshaped(node, place, tensor, other, self._values)
            value = value or self._values.grown(str(one.name), tensor, other)
            if value is None:
                raise _refused(name, _words(tensor), _words(other))
            node.replace_input_with(place, value)


def _reshaped(
    node: ir.Node,
    place: int,
    one: ir.TensorProtocol,
    two: ir.TensorProtocol,
    values: BatchValues,
) -> ir.Value | None:
    """The sizes of a Reshape where one of them is what is left over: no runtime computes them."""
    if node.op_type != "Reshape" or place != 1:
        return None
    differs = one.numpy() != two.numpy()
    if differs.sum() != 1 or (one.numpy() < 0).any():
        return None
    return values.constant(np.where(differs, -1, one.numpy()), "sizes")


def _words(tensor: ir.TensorProtocol) -> str:
    if tensor.size <= 8:  # a list of sizes
        return f"{np.asarray(tensor.numpy()).tolist()}"
    return f"a table {tuple(tensor.shape.numpy())} of other values"


def _refused(where: str, expected: str, got: str) -> ExportError:
    return ExportError(
        f"dynamic batch: {where}",
        expected=f"{expected}, or what grows with the batch",
        got=f"{got} at another batch",
        fix="This operation is made for one batch size: leave dynamic out, and export an artifact "
        "for every size that you need (optimized.for_call).",
    )
