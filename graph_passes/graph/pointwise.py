"""Convolutions of kernel 1 as linear layers over channels, which is what they are.

An exact pass: conv(x, W) = permute(linear(permute(x), W)) where kernel and stride are 1. What
calibrates linear layers then serves models that mix their channels by 1x1 convolutions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.surgery import copy_graph, finish, read_attribute, shape_of

aten = torch.ops.aten
CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})


def pointwise_to_linear(captured: CapturedGraph) -> CapturedGraph:
    """Write every convolution of kernel 1 as a linear layer of the same name.

    A weight that something else reads too is left as it is.
    """
    graph, _ = copy_graph(captured.graph)
    readers: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    flattened: dict[str, Tensor] = {}
    for target, users in readers.items():
        if users and all(_is_pointwise(user, target) for user in users):
            weight = captured.attribute(target).detach()
            flat = weight.reshape(weight.shape[:2])
            flattened[target] = nn.Parameter(flat, requires_grad=False)
            for user in dict.fromkeys(users):
                _write_as_linear(graph, user)
    if not flattened:
        return captured
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in flattened:
            value = node.meta["val"]
            node.meta["val"] = value.new_empty(value.shape[:2])
    attributes = {target: read_attribute(captured.module, target) for target in readers}
    attributes |= flattened
    module = fx.GraphModule(attributes, finish(graph), class_name="Captured")
    return replace(captured, module=module)


def _is_pointwise(node: fx.Node, weight: str) -> bool:
    """Whether a node is a convolution of kernel 1 by this weight."""
    if node.target not in CONVOLUTIONS or not isinstance(node.args[1], fx.Node):
        return False
    kernel = shape_of(node.args[1])[2:]
    source = node.args[0]
    batched = isinstance(source, fx.Node) and len(shape_of(source)) == len(kernel) + 2
    if node.args[1].target != weight or not batched or not _all(kernel, 1):
        return False
    places = ("stride", "padding", "dilation", "groups")
    given = dict(zip(places, node.args[3:], strict=False)) | dict(node.kwargs)
    stride, padding = given.get("stride", 1), given.get("padding", 0)
    alone = bool(given.get("groups", 1) == 1)
    return alone and _all(stride, 1) and _all(padding, 0)


def _all(value: Any, wanted: int) -> bool:
    return all(v == wanted for v in (value if isinstance(value, list | tuple) else (value,)))


def _write_as_linear(graph: fx.Graph, node: fx.Node) -> None:
    source, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    assert isinstance(source, fx.Node)
    value, batch, channels, *places = node.meta["val"], *shape_of(source)
    dims = range(1, len(places) + 1)
    with graph.inserting_before(node):
        last = graph.call_function(aten.permute.default, (source, [0, *(d + 1 for d in dims), 1]))
        given = (last, weight, bias) if bias else (last, weight)
        product = graph.call_function(aten.linear.default, given)
        back = graph.call_function(aten.permute.default, (product, [0, len(places) + 1, *dims]))
    last.meta = node.meta | {"val": value.new_empty([batch, *places, channels])}
    product.meta = node.meta | {"val": value.new_empty([batch, *places, shape_of(node)[1]])}
    back.meta = dict(node.meta)
    node.replace_all_uses_with(back)
    graph.erase_node(node)
