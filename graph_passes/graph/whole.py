"""A graph with the whole model as its only node: for plans that touch nothing inside of it.

The model runs as it is, with whatever it does in Python, its hooks and adapters among them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes.common.offloading import input_device
from calicache.graph_passes.common.shards import arrived
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.signature import CallSignature

WHOLE = "whole_model"


class WholeModel(nn.Module):
    """A model as a function from the tensors of a call to its flat outputs.

    Args:
        model: any module.
        signature: the form of the calls.
    """

    def __init__(self, model: nn.Module, signature: CallSignature) -> None:
        super().__init__()
        self.model, self.signature = model, signature

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        """The leaves of what the model returns."""
        leaves = pytree.tree_leaves(self.model(**self.signature.unflatten(tensors)))
        return tuple(map(arrived, leaves))


def capture_whole(
    model: nn.Module, signature: CallSignature, call: Mapping[str, Tensor]
) -> CapturedGraph:
    """One node for the model, which is run once to see what it returns.

    Args:
        model: any module.
        signature: the form of the calls.
        call: a call of that form.
    """
    device = input_device(model)
    tensors = [call[spec.name].to(device) for spec in signature.tensors]
    with torch.no_grad():
        leaves, tree = pytree.tree_flatten(model(**signature.unflatten(tensors)))
    leaves = [arrived(value) for value in leaves]
    graph = fx.Graph()
    inputs = [_placeholder(graph, place, value) for place, value in enumerate(tensors)]
    whole = graph.call_module(WHOLE, tuple(inputs))
    whole.meta["val"] = tuple(map(_form, leaves))
    graph.output(tuple(_outputs(graph, whole, leaves)))
    module = fx.GraphModule({WHOLE: WholeModel(model, signature)}, graph)
    return CapturedGraph(module.train(model.training), signature, tree)


def is_whole(node: fx.Node) -> bool:
    """Whether a node is a whole model."""
    return node.op == "call_module" and node.target == WHOLE


def _placeholder(graph: fx.Graph, place: int, value: Tensor) -> fx.Node:
    node = graph.placeholder(f"tensor_{place}")
    node.meta["val"] = _form(value)
    return node


def _outputs(graph: fx.Graph, whole: fx.Node, leaves: Sequence[Any]) -> list[Any]:
    outputs: list[Any] = []
    for place, value in enumerate(leaves):
        if not isinstance(value, Tensor):
            outputs.append(value)
            continue
        node = graph.call_function(operator.getitem, (whole, place))
        node.meta["val"] = _form(value)
        outputs.append(node)
    return outputs


def _form(value: Any) -> Any:
    """A tensor without data in the place of one with."""
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
