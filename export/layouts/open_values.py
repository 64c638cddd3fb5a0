"""Values that grow with open sizes: lists of sizes, and tables whose rows are alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import onnx_ir as ir

from calicache.export.artifact.open_sizes import Axis, SizeFormula, Sizes, fitted_formula
from calicache.export.layouts.onnx_graph import describe
from calicache.export.translation.join import initializer

INT64 = ir.DataType.INT64


class OpenValues:
    """Nodes in front of all others that make what depends on open sizes, each once.

    Args:
        graphs: the outermost one of every point; the nodes go into the first.
        points: the open sizes that each is for.
    """

    def __init__(self, graphs: Sequence[ir.Graph], points: Sequence[Sizes]) -> None:
        self._graph, self._points = graphs[0], points
        self._first = graphs[0][0]
        self._made: dict[Hashable, ir.Value] = {}
        self._sources = _sources(graphs, points)

    def grown(self, name: str, tensors: Sequence[ir.TensorProtocol]) -> ir.Value | None:
        """A constant of the first model as it is at all sizes; None where no rule gives it.

        Args:
            name: of the constant.
            tensors: what it is at every point.
        """
        first = tensors[0]
        if any(t.dtype != first.dtype or len(t.shape) != len(first.shape) for t in tensors):
            return None
        if all(tensor.shape == first.shape for tensor in tensors):
            sizes = first.dtype == INT64 and len(first.shape) <= 1
            return self._sizes_like([t.numpy() for t in tensors]) if sizes else None
        shape = self._sizes_like([np.array(t.shape.numpy()) for t in tensors])
        row = _row([tensor.numpy() for tensor in tensors])
        if shape is None or row is None:
            return None
        return self._add("Expand", [self.constant(row, f"{name}/row"), shape], first.dtype, None)

    def constant(self, values: np.ndarray, name: str) -> ir.Value:
        """An initializer of the outermost graph."""
        key = ("constant", values.dtype.str, values.shape, values.tobytes())
        if key not in self._made:
            full = f"{name}.at_every_size.{len(self._made)}"
            self._made[key] = initializer(full, ir.tensor(values, name=full))
            self._graph.register_initializer(self._made[key])
        return self._made[key]

    def _sizes_like(self, arrays: Sequence[np.ndarray]) -> ir.Value | None:
        """Whole numbers, of which some are open; a list or one alone."""
        parts: list[ir.Value] = []
        for sizes in zip(*(array.reshape(-1).tolist() for array in arrays), strict=True):
            formula = fitted_formula(sizes, self._points)
            if formula is None:
                return None
            parts.append(self._size(formula))
        if arrays[0].ndim == 0:
            return self._add("Squeeze", parts, INT64, ())
        return self._add("Concat", parts, INT64, arrays[0].shape, axis=0)

    def _size(self, formula: SizeFormula) -> ir.Value:
        """What a formula gives, (1,)."""
        size = self._total(
            [(factor, self._axis(axis)) for axis, factor in formula.factors.items()],
            formula.constant,
        )
        if formula.per_sample:
            batch = self._axis(Axis.BATCH)
            size = (
                self._product(batch, formula.constant)
                if not formula.factors
                else (self._add("Mul", [batch, size], INT64, (1,)))
            )
        return self._quotient(size, formula.divisor)

    def _axis(self, axis: Axis) -> ir.Value:
        """An open size, (1,), from an input that it is in: `SizeFormula.solved` in nodes."""
        value, place, formula = self._sources[axis]
        size = self._add("Shape", [value], INT64, (1,), start=place, end=place + 1)
        size = self._product(size, formula.divisor)
        others = [(-n, self._axis(a)) for a, n in formula.factors.items() if a is not axis]
        if axis is Axis.BATCH:
            assert not others
            return self._quotient(size, formula.constant)
        if formula.per_sample:
            size = self._add("Div", [size, self._axis(Axis.BATCH)], INT64, (1,))
        size = self._total([(1, size), *others], -formula.constant)
        return self._quotient(size, formula.factors[axis])

    def _total(self, terms: Sequence[tuple[int, ir.Value]], constant: int) -> ir.Value:
        sizes = [self._product(size, factor) for factor, size in terms]
        if constant or not sizes:
            sizes.append(self._number(constant))
        total = sizes[0]
        for size in sizes[1:]:
            total = self._add("Add", [total, size], INT64, (1,))
        return total

    def _product(self, size: ir.Value, by: int) -> ir.Value:
        return size if by == 1 else self._add("Mul", [size, self._number(by)], INT64, (1,))

    def _quotient(self, size: ir.Value, by: int) -> ir.Value:
        return size if by == 1 else self._add("Div", [size, self._number(by)], INT64, (1,))

    def _number(self, number: int) -> ir.Value:
        return self.constant(np.array([number], np.int64), "size")

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
            name = f"sizes/{op}_{len(self._made)}"
            node = ir.node(op, inputs, attributes, name=name)
            describe(node, name, dtype, None if shape is None else ir.Shape(shape))
            self._graph.insert_before(self._first, node)
            self._made[key] = node.outputs[0]
        return self._made[key]


Source = tuple[ir.Value, int, SizeFormula]
"""An input, a dimension of it, and what that is."""


def _sources(graphs: Sequence[ir.Graph], points: Sequence[Sizes]) -> dict[Axis, Source]:
    """Where each open size is read: the batch alone, the others from what is known before them."""
    dimensions = [
        (inputs[0], place, formula)
        for inputs in zip(*(graph.inputs for graph in graphs), strict=True)
        for place, sizes in enumerate(zip(*(_shape(value) for value in inputs), strict=True))
        if (formula := fitted_formula(sizes, points)) is not None and formula.axes
    ]
    known: dict[Axis, Source] = {}
    for source in sorted(dimensions, key=lambda source: len(source[2].axes)):
        axes = source[2].axes - known.keys()
        if len(axes) == 1 and not (axes == {Axis.BATCH} and source[2].factors):
            known[next(iter(axes))] = source
    return known


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape.numpy()


def _row(tables: Sequence[np.ndarray]) -> np.ndarray | None:
    """What a table repeats along the dimensions that differ; None where its rows are not alike."""
    rows = list(tables)
    for axis in range(tables[0].ndim):
        if len({table.shape[axis] for table in tables}) > 1:
            firsts = [np.take(row, [0], axis) for row in rows]
            pairs = zip(rows, firsts, strict=True)
            if not all(np.array_equal(row, np.broadcast_to(one, row.shape)) for row, one in pairs):
                return None
            rows = firsts
    return rows[0] if all(np.array_equal(rows[0], row) for row in rows) else None
