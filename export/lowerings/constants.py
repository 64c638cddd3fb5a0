"""Values that depend on no input, made once: also those whose operations ONNX does not have."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from calicache.export.lowerings.rewriting import Lowering, NewNodes
from calicache.graph_passes.graph.dependence import is_random
from calicache.graph_passes.graph.operations import VIEWS

LARGEST = 1 << 20  # elements; a larger one could be a second copy of a weight


@dataclass(frozen=True, slots=True)
class _Fold:
    """The rule, with the values of all constant nodes in front of the present one."""

    values: dict[fx.Node, Any] = field(default_factory=dict)

    def __call__(self, node: fx.Node, new: NewNodes) -> fx.Node | None:
        if node.op == "get_attr":
            self.values[node] = new.tensors.read(node.target)
        elif self._is_constant(node):
            value = self._value(node)
            self.values[node] = value
            if isinstance(value, Tensor) and value.numel() <= LARGEST and not _is_view(node):
                folded = new.tensor(f"folded.{node.name}", value.detach().clone())
                self.values[folded] = new.tensors.read(folded.target)
                return folded
        return None

    def _is_constant(self, node: fx.Node) -> bool:
        constant = all(source in self.values for source in node.all_input_nodes)
        return node.op == "call_function" and not is_random(node) and constant

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.values.get)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_view(node: fx.Node) -> bool:
    """Whether a node looks at a weight; an item of what another operation made does not."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0].target in VIEWS
    return node.target in VIEWS


def _is_computed(node: fx.Node) -> bool:
    """Whether a node might be the first of a constant's: it reads weights or nothing."""
    weights = all(source.op == "get_attr" for source in node.all_input_nodes)
    return node.op == "call_function" and weights


# A copy in which tensors made from weights and numbers alone are weights themselves.
#
# Views stay where they are, so that no weight is stored twice; so do large values.
fold_constants = Lowering(_Fold, _is_computed)
