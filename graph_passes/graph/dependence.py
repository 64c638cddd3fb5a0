"""What every value of the graph depends on: constant < run < step < latent.

The inputs are classed by how they behaved over a recorded recording; every other node has
the highest class among what it is computed from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import ATTENTION
from calicache.graph_passes.recording.input_classes import Dependence

aten = torch.ops.aten


def classify_nodes(
    captured: CapturedGraph, inputs: Mapping[str, Dependence]
) -> dict[str, Dependence]:
    """Class every node of the graph, by name.

    Args:
        captured: the graph.
        inputs: class of every tensor argument, from `classify_inputs`.
    """
    arguments = iter(captured.signature.tensors)
    classes: dict[str, Dependence] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            classes[node.name] = inputs[next(arguments).name]
        elif is_random(node):
            classes[node.name] = Dependence.LATENT
        else:
            classes[node.name] = max(
                (classes[source.name] for source in node.all_input_nodes),
                default=Dependence.CONSTANT,
            )
    return classes


def is_random(node: fx.Node) -> bool:
    """Whether the op draws new numbers at every call; attention does so only with dropout."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and node.target is not ATTENTION
