"""Values that grow with the batch: sizes, and tables whose rows are alike."""

from __future__ import annotations

from collections.abc import Hashable
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from calicache.export.layouts.onnx_graph import describe
from calicache.export.translation.join import initializer

INT64 = ir.DataType.INT64


def size_in_batches(pair: tuple[int, int], sizes: tuple[int, int]) -> Fraction | None:
    """How many batches a size is that differs between two batch sizes; None if it is no share."""
    share = Fraction(pair[0], sizes[0])
    return share if share == Fraction(pair[1], sizes[1]) else None


class BatchValues:
    """Nodes in front of all others that make what depends on the batch, each once.

    Args:
        graph: the outermost one, for the first batch size.
        other: for the second.
        sizes: of the batch.
    """

    def __init__(self, graph: ir.Graph, other: ir.Graph, sizes: tuple[int, int]) -> None:
        self._graph, self._sizes = graph, sizes
        self._first = graph[0]
        self._made: dict[Hashable, ir.Value] = {}
        self._source = _batched_input(graph, other, sizes)

    def grown(self, name: str, one: ir.TensorProtocol, two: ir.TensorProtocol) -> ir.Value | None:
        """A constant of the first model as it is at every batch; None where no rule gives it.

        Args:
            name: of the constant.
            one: for the first batch size.
            two: for the second.
        """
        if one.dtype != two.dtype or len(one.shape) != len(two.shape):
            return None
        if one.shape == two.shape:
            sizes = one.dtype == INT64 and len(one.shape) <= 1
            return self._sizes_like(one.numpy(), two.numpy()) if sizes else None
        shape = self._sizes_like(np.array(one.shape.numpy()), np.array(two.shape.numpy()))
        row = _row(one, two)
        if shape is None or row is None:
            return None
        return self._add("Expand", [self.constant(row, f"{name}/row"), shape], one.dtype, None)

    def constant(self, values: np.ndarray, name: str) -> ir.Value:
        """An initializer of the outermost graph."""
        key = ("constant", values.dtype.str, values.shape, values.tobytes())
        if key not in self._made:
            full = f"{name}.at_every_batch.{len(self._made)}"
            self._made[key] = initializer(full, ir.tensor(values, name=full))
            self._graph.register_initializer(self._made[key])
        return self._made[key]

    def _sizes_like(self, one: np.ndarray, two: np.ndarray) -> ir.Value | None:
        """Whole numbers, of which some grow with the batch; a list or one alone."""
        parts: list[ir.Value] = []
        for pair in zip(one.reshape(-1).tolist(), two.reshape(-1).tolist(), strict=True):
            share = None if pair[0] == pair[1] else size_in_batches(pair, self._sizes)
            if pair[0] == pair[1]:
                parts.append(self.constant(np.array([pair[0]], np.int64), "size"))
            elif share is None:
                return None
            else:
                parts.append(self._times(share))
        if one.ndim == 0:
            return self._add("Squeeze", parts, INT64, ())
        return self._add("Concat", parts, INT64, one.shape, axis=0)

    def _times(self, share: Fraction) -> ir.Value:
        """A share of the batch, (1,)."""
        value, own = self._source
        axis = {"start": own[0], "end": own[0] + 1}
        size = self._add("Shape", [value], INT64, (1,), **axis)
        factor = share / own[1]
        for op, number in (("Mul", factor.numerator), ("Div", factor.denominator)):
            if number != 1:
                by = self.constant(np.array([number], np.int64), "share")
                size = self._add(op, [size, by], INT64, (1,))
        return size

    def _add(
        self,
        op: str,
        inputs: list[ir.Value],
        dtype: ir.DataType,
        shape: tuple[int, ...] | None,
        **attributes: int,
    ) -> ir.Value:
        key = (op, tuple(map(id, inputs)), tuple(attributes.items()))
        if key not in self._made:
            name = f"batch/{op}_{len(self._made)}"
            node = ir.node(op, inputs, attributes, name=name)
            describe(node, name, dtype, None if shape is None else ir.Shape(shape))
            self._graph.insert_before(self._first, node)
            self._made[key] = node.outputs[0]
        return self._made[key]


def _batched_input(
    graph: ir.Graph, other: ir.Graph, sizes: tuple[int, int]
) -> tuple[ir.Value, tuple[int, Fraction]]:
    """An input with the batch in its shape: which dimension, and how many batches it is."""
    for one, two in zip(graph.inputs, other.inputs, strict=True):
        assert one.shape is not None
        assert two.shape is not None
        for place, pair in enumerate(zip(one.shape.numpy(), two.shape.numpy(), strict=True)):
            share = size_in_batches(pair, sizes)
            if share is not None:
                return one, (place, share)
    raise AssertionError("no input has a batch")


def _row(one: ir.TensorProtocol, two: ir.TensorProtocol) -> np.ndarray | None:
    """What a table repeats along the dimensions that differ; None where its rows are not alike."""
    first, second = one.numpy(), two.numpy()
    for axis, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)):
        if a != b:
            row = np.take(first, [0], axis)
            alike = np.array_equal(first, np.broadcast_to(row, first.shape))
            other = np.take(second, [0], axis)
            if not alike or not np.array_equal(second, np.broadcast_to(other, second.shape)):
                return None
            first, second = row, other
    return first if np.array_equal(first, second) else None
