"""Copying, reading and ending graphs: what every pass does to fx graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weights are; the CPU for a module without any."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def finish(graph: fx.Graph) -> fx.Graph:
    """Drop dead code and check the graph: the last line of every pass."""
    drop_dead_code(graph)
    graph.lint()
    return graph


def drop_dead_code(graph: fx.Graph) -> None:
    """Take out what no output needs; placeholders stay."""
    # fx takes attention for impure, as it may have dropout; here all nodes are pure functions.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def copy_graph(source: fx.Graph) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A copy, and its nodes by the names they have in the source."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(source, copies)
    graph.output(output)
    return graph, {node.name: copy for node, copy in copies.items()}


def find_node(graph: fx.Graph, name: str) -> fx.Node:
    """The node of that name; KeyError without one."""
    nodes: dict[str, fx.Node] = {node.name: node for node in graph.nodes}
    return nodes[name]


def graph_outputs(graph: fx.Graph) -> tuple[fx.node.Argument, ...]:
    """The flat outputs of a graph."""
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    return outputs


def read_attribute(module: nn.Module, target: str) -> Tensor | fx.GraphModule:
    """Follow a dotted `get_attr` target to its tensor, or to the graph that an op runs inside."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor | fx.GraphModule)
    return value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the node's value."""
    return tuple(int(size) for size in node.meta["val"].shape)


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that made the node; `@n` marks its n-th reuse."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    key, (path, _) = list(stack.items())[-1]
    _, at, call = str(key).rpartition("@")
    return f"{path}@{call}" if at else str(path)
