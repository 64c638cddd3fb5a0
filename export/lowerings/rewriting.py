"""What all lowerings share: a rule looks at every node and may put others in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from calicache.graph_passes.graph.surgery import (
    copy_graph,
    drop_dead_code,
    finish,
    read_attribute,
)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors and inner graphs of a graph on its way.

    Attributes:
        module: holds those that were there from the start.
        fresh: those of new `get_attr` nodes, by target.
    """

    module: fx.GraphModule
    fresh: dict[str, Tensor] = field(default_factory=dict)

    def read(self, target: object) -> Tensor | fx.GraphModule:
        """What the `get_attr` nodes of a target stand for."""
        name = str(target)
        return self.fresh[name] if name in self.fresh else read_attribute(self.module, name)


@dataclass(frozen=True, slots=True)
class NewNodes:
    """What a rule writes with: new nodes go in front of the node that it looks at.

    Attributes:
        place: that node.
        tensors: of the graph.
    """

    place: fx.Node
    tensors: Tensors

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
        self.tensors.fresh[target] = tensor
        return self._described(self.place.graph.get_attr(target), value)

    def _described(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta = dict(self.place.meta)
        if value is not None:
            node.meta["val"] = value
        return node


# Gives what takes the node's place, one of its sources maybe; None or the node leaves it.
# Arguments of the node are what earlier nodes have become.
Rule = Callable[[fx.Node, NewNodes], fx.Node | None]


class NotLoweredError(Exception):
    """Raised by a rule that cannot go through with it; the graph is left as it was."""


@dataclass(frozen=True, slots=True)
class Lowering:
    """One rewrite of a graph; called, it gives a rewritten copy of a module.

    Attributes:
        rule: makes the rule for one graph, asked once for every node in the graph's order. What
            it remembers is of that graph.
        concerns: whether the rule may have to do with a node.
    """

    rule: Callable[[], Rule]
    concerns: Callable[[fx.Node], bool]

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        """The module after this lowering alone; see `lower_graph`."""
        return lower_graph(module, self)

    def rewrite(self, graph: fx.Graph, tensors: Tensors) -> None:
        """Put what the rule says in the place of every node, and drop what is dead then."""
        rule = self.rule()
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                successor = rule(node, NewNodes(node, tensors))
            if successor is not None and successor is not node:
                node.replace_all_uses_with(successor)
        drop_dead_code(graph)
        for node in graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                node.meta["val"] = _value(node, tensors)


def lower_graph(module: fx.GraphModule, *lowerings: Lowering) -> fx.GraphModule:
    """A copy after some lowerings, each of which sees what those before it made.

    Args:
        module: nodes describe their values; it is not changed, and is itself the result where no
            lowering has to do with a node.
        lowerings: in order.
    """
    graph, tensors = module.graph, Tensors(module)
    for lowering in lowerings:
        if any(lowering.concerns(node) for node in graph.nodes):
            if graph is module.graph:
                graph, _ = copy_graph(graph)
            try:
                lowering.rewrite(graph, tensors)
            except NotLoweredError:
                return lower_graph(module, *(other for other in lowerings if other is not lowering))
    if graph is module.graph:
        return module
    finish(graph)
    targets = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr")
    attributes = {target: tensors.read(target) for target in targets}
    return fx.GraphModule(attributes, graph, class_name=type(module).__name__)


def _value(node: fx.Node, tensors: Tensors) -> Any:
    """The form of a node's value, from the forms of its arguments."""

    def on_meta(source: fx.Node) -> Any:
        value = tensors.read(source.target) if source.op == "get_attr" else source.meta["val"]
        return tree_map_only(Tensor, _stand_in, value)

    arguments, options = fx.node.map_arg((node.args, dict(node.kwargs)), on_meta)
    with torch.no_grad():
        return node.target(*arguments, **options)  # type: ignore[operator]


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same form; not a fake one of torch.export, whose captures do not mix."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
