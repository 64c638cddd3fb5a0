"""Operations that take another value's shape, dtype or device, with these written out.

`timestep.type_as(latent)` reads no number of the latent; written as a cast to float32 it depends
on the timestep alone, and is seen to be known before the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def write_out_forms(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Replace the operands that only lend their form, in place; shapes are those of the trace.

    Returns:
        The new nodes by those in whose place they are.
    """
    written: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _EXPLICIT and isinstance(node.meta.get("val"), Tensor):
            with graph.inserting_before(node):
                target, args, kwargs = _EXPLICIT[packet](node)
                explicit = graph.call_function(target, args, kwargs)
            explicit.meta = dict(node.meta)
            node.replace_all_uses_with(explicit)
            graph.erase_node(node)
            written[node] = explicit
    if written:  # made anew they are contiguous, which a view of them may not be ready for
        for node in graph.nodes:
            if node.target is aten.view.default:
                node.target = aten.reshape.default
    return written


_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _cast(node: fx.Node) -> _Call:
    return aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}


def _expand(node: fx.Node) -> _Call:
    return aten.expand.default, (node.args[0], list(node.meta["val"].shape)), {}


def _reshape(node: fx.Node) -> _Call:
    return aten.reshape.default, (node.args[0], list(node.meta["val"].shape)), {}


def _filled(target: Callable[..., Any]) -> Callable[[fx.Node], _Call]:
    def call(node: fx.Node) -> _Call:
        value = node.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        return target, (list(value.shape),), options

    return call


def _full(node: fx.Node) -> _Call:
    target, args, options = _filled(aten.full.default)(node)
    # full_like(x, fill) and new_full(x, size, fill): the fill is last.
    fill = node.kwargs.get("fill_value", node.args[-1])
    return target, (*args, fill), options


_EXPLICIT: Mapping[Any, Callable[[fx.Node], _Call]] = {
    aten.type_as: _cast,
    aten.expand_as: _expand,
    aten.view_as: _reshape,
    aten.reshape_as: _reshape,
    aten.zeros_like: _filled(aten.zeros.default),
    aten.new_zeros: _filled(aten.zeros.default),
    aten.ones_like: _filled(aten.ones.default),
    aten.new_ones: _filled(aten.ones.default),
    # What is empty is written before it is read; zeros are the same at every call.
    aten.empty: _filled(aten.zeros.default),
    aten.empty_like: _filled(aten.zeros.default),
    aten.new_empty: _filled(aten.zeros.default),
    aten.full_like: _full,
    aten.new_full: _full,
}
