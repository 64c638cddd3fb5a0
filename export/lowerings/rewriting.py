"""What all lowerings share: a rule looks at every node and may put others in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from calicache.graph_passes.graph.surgery import copy_graph, finish, read_attribute


@dataclass(frozen=True, slots=True)
class NewNodes:
    """What a rule writes with: new nodes go in front of the node that it looks at.

    Attributes:
        place: that node.
        module: the graph's tensors and inner graphs, as they were.
        tensors: of new `get_attr` nodes, by target.
    """

    place: fx.Node
    module: fx.GraphModule
    tensors: dict[str, Tensor]

    def call(self, target: Any, *arguments: Any, value: Any = None, options: Any = None) -> fx.Node:
        """A new operation.

        Args:
            target: the operation.
            arguments: by position.
            value: of the form that its result has; that of the node in its place where None.
            options: arguments by name.
        """
        return self._described(self.place.graph.call_function(target, arguments, options), value)

    def tensor(self, target: str, tensor: Tensor, value: Any = None) -> fx.Node:
        """A new weight, under a dotted name that is not in use; `value` as in `call`."""
        self.tensors[target] = tensor
        return self._described(self.place.graph.get_attr(target), value)

    def _described(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta = dict(self.place.meta)
        if value is not None:
            node.meta["val"] = value
        return node


# Gives what takes the node's place, one of its sources maybe; None or the node leaves it.
# Arguments of the node are what earlier nodes have become.
Rule = Callable[[fx.Node, NewNodes], fx.Node | None]


def rewrite_nodes(
    module: fx.GraphModule, rule: Rule, concerns: Callable[[fx.Node], bool] | None = None
) -> fx.GraphModule:
    """A copy in which every node is what a rule makes of it, without what is dead then.

    Args:
        module: nodes describe their values; it is not changed.
        rule: asked once for every node, in the graph's order.
        concerns: whether the rule may have to do with a node; where it has with none, the module
            itself is the result. None copies at any rate.
    """
    if concerns and not any(concerns(node) for node in module.graph.nodes):
        return module
    graph, _ = copy_graph(module.graph)
    tensors: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            successor = rule(node, NewNodes(node, module, tensors))
        if successor is not None and successor is not node:
            node.replace_all_uses_with(successor)
    finish(graph)
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            node.meta["val"] = _value(node, module, tensors)
    targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    attributes = {
        target: tensors[target] if target in tensors else read_attribute(module, target)
        for target in targets
    }
    return fx.GraphModule(attributes, graph, class_name=type(module).__name__)


def _value(node: fx.Node, module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> Any:
    """The form of a node's value, from the forms of its arguments."""

    def on_meta(source: fx.Node) -> Any:
        if source.op != "get_attr":
            value = source.meta["val"]
        elif str(source.target) in tensors:
            value = tensors[str(source.target)]
        else:
            value = read_attribute(module, str(source.target))
        return tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), value)

    arguments, options = fx.node.map_arg((node.args, dict(node.kwargs)), on_meta)
    with torch.no_grad():
        return node.target(*arguments, **options)  # type: ignore[operator]
