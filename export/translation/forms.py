"""The forms of operations: what is done to values of which dtypes and shapes.

A diffusion transformer is one block many times over, and its modes share most of a block: a
thousand operations have some eighty forms, and only a form needs translating.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from calicache.graph_passes.graph.surgery import read_attribute


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What operations have in common that differ in the values alone that they are given.

    Attributes:
        text: the operation, its numbers, and dtype and shape of every value; equal for two
            operations of one form.
        node: an operation of this form.
        module: the graph that it is from.
        sources: the nodes that it reads, each once.
        items: which of its results are read, where it has several; empty where it has one.
    """

    text: str
    node: fx.Node
    module: fx.GraphModule
    sources: tuple[fx.Node, ...]
    items: tuple[int, ...]

    @property
    def graphs(self) -> tuple[fx.Node, ...]:
        """The sources that are graphs, which run inside the operation."""
        return tuple(source for source in self.sources if _is_graph(source, self.module))

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """The sources that are tensors."""
        return tuple(source for source in self.sources if not _is_graph(source, self.module))


def forms_of(module: fx.GraphModule) -> dict[fx.Node, Form]:
    """The form of every operation of a graph, in its order; items of results have none.

    Args:
        module: its nodes describe their values.
    """
    return {node: _form(node, module) for node in module.graph.nodes if _is_operation(node)}


def value_of(node: fx.Node, module: fx.GraphModule) -> Tensor:
    """A tensor of the dtype and shape of the node's value: the weight itself, or its stand-in."""
    value = read_attribute(module, str(node.target)) if node.op == "get_attr" else node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _is_operation(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem


def _form(node: fx.Node, module: fx.GraphModule) -> Form:
    sources = tuple(node.all_input_nodes)
    described = {
        source: f"%{place} {_description(source, module)}" for place, source in enumerate(sources)
    }
    arguments = fx.node.map_arg((node.args, dict(node.kwargs)), described.__getitem__)
    items = () if isinstance(node.meta["val"], Tensor) else _items(node.users)
    name = getattr(node.target, "__qualname__", node.target)
    return Form(f"{name} {arguments} {items}", node, module, sources, items)


def _items(users: Iterable[fx.Node]) -> tuple[int, ...]:
    return tuple(sorted({int(user.args[1]) for user in users}))  # type: ignore[arg-type]


def _description(source: fx.Node, module: fx.GraphModule) -> str:
    """What a form's text says of a source."""
    if _is_graph(source, module):
        return f"graph {id(read_attribute(module, str(source.target)))}"
    value = value_of(source, module)
    return f"{value.dtype} {tuple(value.shape)}"


def _is_graph(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op != "get_attr":
        return False
    return isinstance(read_attribute(module, str(node.target)), fx.GraphModule)
