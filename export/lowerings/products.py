"""Products with a weight as linear layers over rows, so that no weight is turned around.

ONNX's Gemm takes a weight (out, in) as it lies, and rows (N, in) alone.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.graph.surgery import shape_of

aten = torch.ops.aten
WEIGHT_PLACES = {aten.mm.default: 1, aten.addmm.default: 2}
TURNS = (aten.t.default, aten.transpose.int)


def _is_product(node: fx.Node) -> bool:
    return node.target is LINEAR or node.target in WEIGHT_PLACES


def _to_linear(node: fx.Node, new: NewNodes) -> fx.Node | None:
    if node.target is LINEAR:
        return _over_rows(node, new)
    place = WEIGHT_PLACES.get(node.target)  # type: ignore[call-overload]
    if place is None or node.kwargs:
        return None
    turned = node.args[place]
    assert isinstance(turned, fx.Node)
    if turned.target not in TURNS or len(shape_of(turned)) != 2:
        return None
    weight = turned.all_input_nodes[0]
    bias = node.args[: place - 1]
    if bias and len(shape_of(bias[0])) != 1:  # type: ignore[arg-type]
        return None
    return new.call(LINEAR, node.args[place - 1], weight, *bias)


def _over_rows(node: fx.Node, new: NewNodes) -> fx.Node | None:
    source, *weights = node.args
    assert isinstance(source, fx.Node)
    *counts, features = shape_of(source)
    if len(counts) == 1:
        return None
    rows, value = math.prod(counts), node.meta["val"]
    flat = new.call(
        aten.reshape.default,
        source,
        [rows, features],
        value=source.meta["val"].reshape(rows, features),
    )
    result = new.call(
        LINEAR, flat, *weights, options=dict(node.kwargs), value=value.reshape(rows, -1)
    )
    return new.call(aten.reshape.default, result, list(shape_of(node)))


# A copy in which x @ W.T and b + x @ W.T are linear layers, and these take rows alone.
products_to_linears = Lowering(lambda: _to_linear, _is_product)
