"""Calibration branches: targets become y* + B A (x - x*), or y_ref + Q(W) Q(x - x_ref).

A branch in integers is so near that the newest REFRESH will do for its anchor: sums of kept values
would take longer to read than the product takes (docs/decisions/0022-increments-in-int8.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.factors import Factors
from calicache.graph_passes.factors.quantise import QuantisedWeight
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import (
    LINEAR,
    quantise,
    quantised_product,
    token_scales,
)
from calicache.graph_passes.graph.surgery import shape_of
from calicache.graph_passes.rewriting.fold import reads_output
from calicache.graph_passes.rewriting.insertion import CacheSource, Insertion
from calicache.graph_passes.sites.targets import CalibrationTarget

aten = torch.ops.aten


class Calibration:
    """Replaces targets of one graph by their corrected anchors."""

    def __init__(
        self,
        insert: Insertion,
        copies: Mapping[str, fx.Node],
        factors: Mapping[str, Factors],
        folded: frozenset[str],
    ) -> None:
        self.insert, self.copies, self.factors, self.folded = insert, copies, factors, folded
        self.replaced: dict[str, fx.Node] = {}
        self._increments: dict[str, fx.Node] = {}
        self._levels: dict[str, tuple[fx.Node, fx.Node]] = {}

    def replace(self, target: CalibrationTarget) -> None:
        """Every node of the target becomes its anchor, corrected where it has a branch."""
        factors = self.factors[target.name] if target.corrects else None
        if factors is None:
            for name in target.nodes:
                node = self.copies[name]
                with self.insert.graph.inserting_before(node):
                    self._replace(node, self.insert.anchor(node))
        elif isinstance(factors, QuantisedWeight):
            node = self.copies[target.nodes[0]]
            with self.insert.graph.inserting_before(node):
                correction = self._product(target, factors)
                newest = self.insert.newest(node)
                self._replace(node, self._corrected(node, newest, correction, target.name))
        else:
            self._replace_by_factors(target, factors)

    def _replace_by_factors(self, target: CalibrationTarget, factors: CalibrationFactors) -> None:
        """Every node becomes its anchor plus its part of B A (x - x*)."""
        insert, first = self.insert, self.copies[target.nodes[0]]
        with insert.graph.inserting_before(first):
            inner = self._inner(target, factors)
        widths = [shape_of(self.copies[name])[-1] for name in target.nodes]
        parts = torch.split(factors.up, widths)
        for number, name in enumerate(target.nodes):
            node = self.copies[name]
            with insert.graph.inserting_before(node):
                up = parts[number].contiguous()
                if len(parts) > 1:
                    up = up.clone()  # memory of its own, as safetensors demands
                part = "up" if len(parts) == 1 else f"up_{number}"
                correction = insert.linear(inner, target.name, part, up)
                anchor = insert.anchor_rows(node)
                self._replace(node, self._corrected(node, anchor, correction, target.name))

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.replaced[node.name] = new

    def _inner(self, target: CalibrationTarget, factors: CalibrationFactors) -> fx.Node:
        """A (x - x*), rows (T, r)."""
        insert, down = self.insert, factors.down
        if target.name in self.folded:
            rows = insert.rows(self._source(target))
            inner = insert.linear(rows, target.name, "down", down)
            anchor = insert.anchor_of(folded_source(target), inner.meta["val"])
            return insert.call(aten.sub.Tensor, inner, anchor, target.name)
        return insert.linear(self._increment_rows(target), target.name, "down", down)

    def _product(self, target: CalibrationTarget, factors: QuantisedWeight) -> fx.Node:
        """Q(W) Q(x - x_ref), rows (T, out) in the dtype of y."""
        insert, site, source = self.insert, target.name, self._source(target)
        if source.name not in self._levels:
            kept = insert.kept(self.copies[target.input_node])
            increment = insert.call(aten.sub.Tensor, source, kept, site)
            wide = _in_dtype(insert, insert.rows(increment), torch.float32)
            scales = insert.operation(token_scales, site, wide)
            self._levels[source.name] = insert.operation(quantise, site, wide, scales), scales
        levels, scales = self._levels[source.name]
        weight = insert.constant(source, site, "levels", factors.levels)
        weight_scales = insert.constant(source, site, "scales", factors.scales)
        product = insert.operation(quantised_product, site, levels, scales, weight, weight_scales)
        return _in_dtype(insert, product, source.meta["val"].dtype)

    def _increment_rows(self, target: CalibrationTarget) -> fx.Node:
        """Rows (T, in) of x - x*; made once for all targets that read x."""
        insert, source = self.insert, self._source(target)
        if source.name not in self._increments:
            anchor = insert.anchor(self.copies[target.input_node])
            increment = insert.call(aten.sub.Tensor, source, anchor, target.name)
            self._increments[source.name] = increment
        return insert.rows(self._increments[source.name])

    def _source(self, target: CalibrationTarget) -> fx.Node:
        """x, which may be a target of its own."""
        return self.replaced.get(target.input_node, self.copies[target.input_node])

    def _corrected(self, node: fx.Node, anchor: fx.Node, correction: fx.Node, name: str) -> fx.Node:
        """An anchor as it is cached and its correction in rows, added, in the node's own shape."""
        insert = self.insert
        if node.target is LINEAR:
            total = insert.call(aten.add.Tensor, anchor, correction, name)
            return insert.shaped(total, node)
        return insert.call(aten.add.Tensor, anchor, insert.shaped(correction, node), name)


def folded_source(target: CalibrationTarget) -> CacheSource:
    """The cache of A x."""
    return CacheSource(target.input_node, target.name, target.nodes[0])


def folded_value(
    insert: Insertion,
    captured: CapturedGraph,
    copies: Mapping[str, fx.Node],
    target: CalibrationTarget,
    factors: CalibrationFactors,
) -> fx.Node:
    """A x of a REFRESH step, rows (T, r); K (y - b) where y has fewer channels than x."""
    site = target.name
    if not reads_output(target):
        source = copies[target.input_node]
        with insert.graph.inserting_before(source.next):
            rows = insert.rows(source)
        with insert.graph.inserting_before(rows.next):
            return insert.linear(rows, site, "down", factors.down)
    assert factors.read is not None
    product = insert.linear_over_rows(copies[target.nodes[0]])
    bias = product.args[2] if len(product.args) > 2 else None
    offset = None
    if isinstance(bias, fx.Node):
        offset = -(factors.read @ captured.attribute(str(bias.target)).detach())  # -K b, (r,)
    with insert.graph.inserting_before(product.next):
        return insert.linear(product, site, "read", factors.read.contiguous(), offset)


def _in_dtype(insert: Insertion, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node.meta["val"].dtype is dtype:
        return node
    return insert.unary(aten._to_copy.default, node, dtype=dtype)
