"""Writing new nodes into a graph that is being rewritten, with the meta data others rely on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from calicache.graph_passes.branches import LINEAR
from calicache.graph_passes.capture import shape_of

aten = torch.ops.aten


def cache_name(node: str) -> str:
    """Name of the placeholder that takes the cached value of a node."""
    return f"cache_{node}"


class Insertion:
    """New nodes of one variant, at the graph's insertion point.

    Attributes:
        graph: the variant's graph.
        attributes: tensors that the new `get_attr` nodes name.
        made: the new nodes, caches left out.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.attributes: dict[str, Tensor] = {}
        self.made: list[fx.Node] = []
        self._caches: dict[str, fx.Node] = {}
        self._rows: dict[str, fx.Node] = {}

    def rows(self, source: fx.Node) -> fx.Node:
        """All tokens as rows (T, channels); made once for each value."""
        if source.name not in self._rows:
            value = source.meta["val"]
            channels = value.shape[-1]
            view = self.graph.call_function(aten.reshape.default, (source, [-1, channels]))
            rows = value.new_empty(value.shape[:-1].numel(), channels)
            self._rows[source.name] = self._finish(view, rows, source, None)
        return self._rows[source.name]

    def shaped(self, rows: fx.Node, like: fx.Node) -> fx.Node:
        """Rows (T, channels) in the shape of another value."""
        view = self.graph.call_function(aten.reshape.default, (rows, list(shape_of(like))))
        self._rows[view.name] = rows
        return self._finish(view, like.meta["val"], like, None)

    def linear_over_rows(self, node: fx.Node) -> fx.Node:
        """Write a linear layer over rows; returns the product (T, out)."""
        source, *rest = node.args
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(node):
            product = self.graph.create_node("call_function", LINEAR, (self.rows(source), *rest))
            value = node.meta["val"]
            rows = value.new_empty(value.shape[:-1].numel(), value.shape[-1])
            self._finish(product, rows, node, None)
            node.replace_all_uses_with(self.shaped(product, node))
        self._rows[node.name] = product
        return product

    def cached(self, like: fx.Node) -> fx.Node:
        """The cache of a value: rows (T, out) for a linear layer, else in the value's shape."""
        value = like.meta["val"]
        if like.target is LINEAR:
            value = value.new_empty(value.shape[:-1].numel(), value.shape[-1])
        return self.cache(cache_name(like.name), value)

    def anchor(self, like: fx.Node) -> fx.Node:
        """The cache of a value, in the value's own shape."""
        cached = self.cached(like)
        return self.shaped(cached, like) if like.target is LINEAR else cached

    def cache(self, name: str, value: Tensor) -> fx.Node:
        """The placeholder of that name, made once."""
        if name not in self._caches:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self._caches[name] = self.graph.placeholder(name)
            self._caches[name].meta["val"] = value
        return self._caches[name]

    def linear(self, source: fx.Node, site: str, part: str, weight: Tensor) -> fx.Node:
        """Multiply rows (T, in) by a factor (out, in) of a site."""
        target = f"calibration.{site}.{part}_factor"
        self.attributes[target] = weight
        value = source.meta["val"]
        factor = self.graph.get_attr(target)
        self._finish(factor, value.new_empty(weight.shape), source, site)
        product = self.graph.create_node("call_function", LINEAR, (source, factor))
        shape = (*value.shape[:-1], weight.shape[0])
        return self._finish(product, value.new_empty(shape), source, site)

    def call(self, op: Callable[..., Tensor], left: fx.Node, right: fx.Node, site: str) -> fx.Node:
        """An element-wise operation on two values of one shape."""
        node = self.graph.call_function(op, (left, right))
        return self._finish(
            node, left.meta["val"], right if left.op == "placeholder" else left, site
        )

    def _finish(self, node: fx.Node, value: Tensor, source: fx.Node, site: str | None) -> fx.Node:
        node.meta = {"val": value, "nn_module_stack": source.meta.get("nn_module_stack")}
        if site:
            node.meta["calibrates"] = site
        self.made.append(node)
        return node
