"""Writing new nodes into a graph that is being rewritten, with the meta data others rely on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.graph.surgery import shape_of

aten = torch.ops.aten


ANCHOR_WEIGHT, OUTPUT_WEIGHT = "anchor_weight", "output_weight"
DOUBLE = (torch.float64, torch.complex128)


def cache_name(node: str) -> str:
    """Name of the placeholder that takes the cached value of a node."""
    return f"cache_{node}"


@dataclass(frozen=True, slots=True)
class CacheSource:
    """Where the value of a cache comes from in the plain graph.

    Attributes:
        node: the node whose value is kept; x where it is folded.
        folded: the calibration target whose A x is kept in the place of x, or None.
        place: the node by which the cache is named and ordered; the first output of that target.
        is_output: whether it is the model's own output, which more steps than REFRESH ones keep.
    """

    node: str
    folded: str | None
    place: str
    is_output: bool = False

    @staticmethod
    def of(node: fx.Node) -> CacheSource:
        """A node's own value."""
        return CacheSource(node.name, None, node.name)

    @staticmethod
    def of_output(node: fx.Node) -> CacheSource:
        """An output of the model, before it is mixed."""
        return CacheSource(node.name, None, node.name, is_output=True)

    @property
    def name(self) -> str:
        """Name of the placeholder that takes its newest value."""
        own = cache_name(f"output_{self.place}" if self.is_output else self.place)
        return f"{own}_down" if self.folded else own


@dataclass(frozen=True, slots=True)
class CacheSlot:
    """One kept value of a cache, as a variant reads it.

    Attributes:
        source: of the cache.
        back: how many values before the newest.
        shape, dtype: of the cached value.
    """

    source: CacheSource
    back: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def slot_name(cache: str, back: int) -> str:
    """Name of a cache's value `back` values before the newest."""
    return f"{cache}_back{back}" if back else cache


def weight_name(table: str, place: int) -> str:
    """Name of the scalar input that takes one weight of a step."""
    return f"{table}_{place}"


class Insertion:
    """New nodes of one variant, at the graph's insertion point.

    Attributes:
        graph: the variant's graph.
        history: how many refreshes of every value are kept, order + 1.
        attributes: tensors that the new `get_attr` nodes name.
        new_nodes: in the order in which they were written, caches left out.
        cache_slots: what is read of the caches, by name of the placeholder.
    """

    def __init__(self, graph: fx.Graph, history: int = 1) -> None:
        self.graph, self.history = graph, history
        self.attributes: dict[str, Tensor] = {}
        self.new_nodes: list[fx.Node] = []
        self.cache_slots: dict[str, CacheSlot] = {}
        self._placeholders: dict[str, fx.Node] = {}
        self._rows: dict[str, fx.Node] = {}
        self._linears: dict[str, fx.Node] = {}
        self._anchors: dict[str, fx.Node] = {}
        self._exact_weights: list[fx.Node] = []

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
        """Write a linear layer over rows, once; returns the product (T, out)."""
        if node.name in self._linears:
            return self._linears[node.name]
        source, *rest = node.args
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(node):
            product = self.graph.create_node("call_function", LINEAR, (self.rows(source), *rest))
            value = node.meta["val"]
            rows = value.new_empty(value.shape[:-1].numel(), value.shape[-1])
            self._finish(product, rows, node, None)
            node.replace_all_uses_with(self.shaped(product, node))
        self._rows[node.name] = self._linears[node.name] = product
        return product

    def anchor(self, like: fx.Node) -> fx.Node:
        """The anchor of a value, in the value's own shape."""
        anchor = self.anchor_rows(like)
        return self.shaped(anchor, like) if like.target is LINEAR else anchor

    def kept(self, like: fx.Node) -> fx.Node:
        """The newest kept value of a node, in the node's own shape."""
        newest = self.newest(like)
        return self.shaped(newest, like) if like.target is LINEAR else newest

    def newest(self, like: fx.Node) -> fx.Node:
        """The newest kept value of a node as it is cached: rows (T, out) for a linear layer."""
        return self.slot(CacheSource.of(like), 0, cached_form(like))

    def anchor_rows(self, like: fx.Node) -> fx.Node:
        """The anchor of a value as it is cached: rows (T, out) for a linear layer."""
        return self.anchor_of(CacheSource.of(like), cached_form(like))

    def anchor_of(self, source: CacheSource, value: Tensor) -> fx.Node:
        """sum_k w_k c_k over the kept refreshes of a cache, or the one there is."""
        if source.name not in self._anchors:
            slots = self.slots(source, value)
            if self.history == 1:
                self._anchors[source.name] = slots[0]
            elif value.dtype in DOUBLE:
                self._anchors[source.name] = self._sum(slots, self._weights_of_one())
            else:
                self._anchors[source.name] = self.weighted_sum(slots, ANCHOR_WEIGHT)
        return self._anchors[source.name]

    def slots(self, source: CacheSource, value: Tensor) -> list[fx.Node]:
        """The placeholders of all kept refreshes of a cache, newest first."""
        return [self.slot(source, back, value) for back in range(self.history)]

    def slot(self, source: CacheSource, back: int, value: Tensor) -> fx.Node:
        """The placeholder of one kept refresh of a cache."""
        name = slot_name(source.name, back)
        self.cache_slots[name] = CacheSlot(source, back, tuple(value.shape), value.dtype)
        return self.placeholder(name, value)

    def weighted_sum(self, terms: Sequence[fx.Node], table: str, first: int = 0) -> fx.Node:
        """sum_k w_k terms_k with the weights of this step from `first` on."""
        places = range(first, first + len(terms))
        return self._sum(terms, [self.weight(table, place) for place in places])

    def _weights_of_one(self) -> list[fx.Node]:
        """Weights of the kept refreshes in float64, the newest being what the others leave of 1.

        A step's weights are float32 numbers, whose sum is off 1 by 1e-8. In float64 that would
        show: y* + W (x - x*) is y for any weights, but only where they sum to 1.
        """
        if not self._exact_weights:
            older = [self.weight(ANCHOR_WEIGHT, back) for back in range(1, self.history)]
            placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
            with self.graph.inserting_before(placeholders[-1].next):
                wide = [self.unary(aten._to_copy.default, w, dtype=torch.float64) for w in older]
                total = reduce(lambda a, b: self.call(aten.add.Tensor, a, b), wide)
                self._exact_weights = [self.unary(aten.rsub.Scalar, total, 1.0), *wide]
        return self._exact_weights

    def _sum(self, terms: Sequence[fx.Node], weights: Sequence[fx.Node]) -> fx.Node:
        """sum_k weights_k terms_k."""
        total: fx.Node | None = None
        for term, weight in zip(terms, weights, strict=True):
            scaled = self.call(aten.mul.Tensor, term, weight)
            total = scaled if total is None else self.call(aten.add.Tensor, total, scaled)
        assert total is not None
        return total

    def weight(self, table: str, place: int) -> fx.Node:
        """One weight of this step: a scalar input."""
        return self.placeholder(weight_name(table, place), torch.empty((), device="meta"))

    def placeholder(self, name: str, value: Tensor) -> fx.Node:
        """The input of that name, made once."""
        if name not in self._placeholders:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self._placeholders[name] = self.graph.placeholder(name)
            self._placeholders[name].meta["val"] = value
        return self._placeholders[name]

    def linear(
        self, source: fx.Node, site: str, part: str, weight: Tensor, bias: Tensor | None = None
    ) -> fx.Node:
        """Multiply rows (T, in) by a factor (out, in) of a site, and add a bias (out,)."""
        value = source.meta["val"]
        tensors = [self.constant(source, site, f"{part}_factor", weight)]
        if bias is not None:
            tensors.append(self.constant(source, site, f"{part}_bias", bias))
        product = self.graph.create_node("call_function", LINEAR, (source, *tensors))
        shape = (*value.shape[:-1], weight.shape[0])
        return self._finish(product, value.new_empty(shape), source, site)

    def constant(self, source: fx.Node, site: str, name: str, value: Tensor) -> fx.Node:
        """A tensor of a site that the model does not have."""
        target = f"calibration.{site}.{name}"
        self.attributes[target] = value
        node = self.graph.get_attr(target)
        form = source.meta["val"].new_empty(value.shape, dtype=value.dtype)
        return self._finish(node, form, source, site)

    def call(
        self, op: Callable[..., Tensor], left: fx.Node, right: fx.Node, site: str | None = None
    ) -> fx.Node:
        """An element-wise operation; the result has the left value's shape."""
        node = self.graph.call_function(op, (left, right))
        source = left if left.meta.get("nn_module_stack") else right
        return self._finish(node, left.meta["val"], source, site)

    def operation(self, op: Callable[..., Tensor], site: str, *values: fx.Node) -> fx.Node:
        """An operation of a calibration branch on some values."""
        node = self.graph.call_function(op, values)
        return self._finish(node, op(*(value.meta["val"] for value in values)), values[0], site)

    def unary(
        self, op: Callable[..., Tensor], source: fx.Node, *args: Any, **kwargs: Any
    ) -> fx.Node:
        """An operation on one value; other arguments are constants."""
        node = self.graph.call_function(op, (source, *args), kwargs)
        return self._finish(node, op(source.meta["val"], *args, **kwargs), source, None)

    def _finish(self, node: fx.Node, value: Tensor, source: fx.Node, site: str | None) -> fx.Node:
        node.meta = {"val": value, "nn_module_stack": source.meta.get("nn_module_stack")}
        if site:
            node.meta["calibrates"] = site
        self.new_nodes.append(node)
        return node


def cached_form(like: fx.Node) -> Tensor:
    """A value of the shape and dtype that its cache has."""
    value: Tensor = like.meta["val"]
    if like.target is LINEAR:
        return value.new_empty(value.shape[:-1].numel(), value.shape[-1])
    return value
