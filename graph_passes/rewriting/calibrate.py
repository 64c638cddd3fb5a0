"""Calibration branches: targets of a graph become y* + B A (x - x*)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import LINEAR
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
        factors: Mapping[str, CalibrationFactors],
        folded: frozenset[str],
    ) -> None:
        self.insert, self.copies, self.factors, self.folded = insert, copies, factors, folded
        self.replaced: dict[str, fx.Node] = {}
        self._increments: dict[str, fx.Node] = {}

    def replace(self, target: CalibrationTarget) -> None:
        """Every node of the target becomes its anchor plus its part of B A (x - x*)."""
        insert, first = self.insert, self.copies[target.nodes[0]]
        if target.rank:
            with insert.graph.inserting_before(first):
                inner = self._inner(target)
            parts = torch.split(self.factors[target.name].up, list(target.out_features))
        for number, name in enumerate(target.nodes):
            node = self.copies[name]
            with insert.graph.inserting_before(node):
                if not target.rank:
                    new = insert.anchor(node)
                else:
                    up = parts[number].contiguous()
                    part = "up" if len(parts) == 1 else f"up_{number}"
                    correction = insert.linear(inner, target.name, part, up)
                    new = self._corrected(node, correction, target.name)
            node.replace_all_uses_with(new)
            self.replaced[name] = new

    def _inner(self, target: CalibrationTarget) -> fx.Node:
        """A (x - x*), rows (T, r)."""
        insert, down = self.insert, self.factors[target.name].down
        plain = self.copies[target.input_node]
        source = self.replaced.get(target.input_node, plain)  # x may be a target of its own
        if target.name in self.folded:
            inner = insert.linear(insert.rows(source), target.name, "down", down)
            anchor = insert.anchor_of(folded_source(target), inner.meta["val"])
            return insert.call(aten.sub.Tensor, inner, anchor, target.name)
        if source.name not in self._increments:
            anchor = insert.anchor(plain)
            increment = insert.call(aten.sub.Tensor, source, anchor, target.name)
            self._increments[source.name] = increment
        rows = insert.rows(self._increments[source.name])
        return insert.linear(rows, target.name, "down", down)

    def _corrected(self, node: fx.Node, correction: fx.Node, name: str) -> fx.Node:
        insert = self.insert
        if node.target is LINEAR:
            total = insert.call(aten.add.Tensor, insert.anchor_rows(node), correction, name)
            return insert.shaped(total, node)
        shaped = insert.shaped(correction, node)
        return insert.call(aten.add.Tensor, insert.anchor(node), shaped, name)


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
        return insert.linear(product, site, "read", factors.read, offset)
