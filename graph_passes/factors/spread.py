"""Statistics of a model that several processes share: of whole layers, and of the tokens of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import distributed, fx
from torch.distributed import distributed_c10d

from calicache.graph_passes.common.errors import ObserveError
from calicache.graph_passes.common.ranks import Ranks
from calicache.graph_passes.common.shards import (
    COLUMNS,
    WeightShard,
    add_up,
    gather_channels,
    groups_of,
)
from calicache.graph_passes.factors.statistics import SecondMoments, Statistics
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.surgery import copy_graph
from calicache.graph_passes.sites.targets import CalibrationTarget


def with_whole_values(
    captured: CapturedGraph, targets: Sequence[CalibrationTarget]
) -> tuple[CapturedGraph, Sequence[CalibrationTarget]]:
    """A graph that also gives x and y of split layers whole, and targets that name these.

    Args:
        captured: the graph of this process.
        targets: what is to be observed.
    """
    if not any(target.shard for target in targets):
        return captured, targets
    graph, copies = copy_graph(captured.graph)
    whole = [_watched(graph, copies, target) for target in targets]
    module = fx.GraphModule(captured.module, graph, class_name="Captured")
    return replace(captured, module=module), whole


def _watched(
    graph: fx.Graph, copies: Mapping[str, fx.Node], target: CalibrationTarget
) -> CalibrationTarget:
    """A target that looks at whole values, which the graph gets nodes for."""
    shard, source = target.shard, copies[target.input_node]
    if shard is None:
        return target
    x = _gathered(graph, source, shard) if shard.dim == COLUMNS else source
    make = _summed if shard.dim == COLUMNS else _gathered
    ys = tuple(make(graph, copies[name], shard).name for name in target.nodes)
    return replace(target, input_node=x.name, nodes=ys)


def _gathered(graph: fx.Graph, node: fx.Node, shard: WeightShard) -> fx.Node:
    with graph.inserting_after(node):
        return graph.call_function(gather_channels, (node, shard.count, shard.group))


def _summed(graph: fx.Graph, node: fx.Node, shard: WeightShard) -> fx.Node:
    """The sum over all processes, with the bias that a split layer adds after it."""
    with graph.inserting_after(node):
        total = graph.call_function(add_up, (node, shard.group))
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    bias = str(weight.target).removesuffix("weight") + "bias"
    if not any(other.op == "get_attr" and other.target == bias for other in graph.nodes):
        return total
    with graph.inserting_after(total):
        offset = graph.get_attr(bias)
    with graph.inserting_after(offset):
        return graph.call_function(torch.ops.aten.add.Tensor, (total, offset))


def over_all_tokens(
    captured: CapturedGraph,
    targets: Sequence[CalibrationTarget],
    statistics: Mapping[str, Statistics],
) -> Mapping[str, Statistics]:
    """Moments over the tokens of all processes, where a model splits its tokens among them.

    Args:
        captured: the graph of this process; its collective operations tell.
        targets: what was observed.
        statistics: by name of the target, over the tokens of this process.

    Raises:
        ObserveError: they are no moments, and so no means over tokens.
    """
    ranks = _sharing_tokens(captured)
    if ranks.size == 1:
        return statistics
    tokens = {target.name: target.tokens for target in targets}
    return {name: _mean(ranks, name, own, tokens[name]) for name, own in statistics.items()}


def _mean(ranks: Ranks, name: str, own: Statistics, tokens: int) -> SecondMoments:
    if not isinstance(own, SecondMoments):
        raise ObserveError(
            name,
            expected="weighting 'covariance' or 'none' for a model whose tokens are split over "
            f"{ranks.size} processes",
            got="one by channels, whose means over tokens are none of parts of them",
            fix="Plan with weighting='covariance', or before the model is split: the plan is of "
            "its weights, and holds.",
        )
    total = ranks.add(torch.tensor(float(tokens), dtype=torch.float64))
    means = {
        part: (ranks.add(value.double() * tokens) / total).to(value.dtype)
        for part, value in own.tensors().items()
    }
    return SecondMoments(**{field.name: means.get(field.name) for field in fields(SecondMoments)})


def _sharing_tokens(captured: CapturedGraph) -> Ranks:
    """The processes that the graph talks to, but for those that share weights with this one."""
    groups = groups_of(captured.graph) - {shard.group for shard in captured.shards.values()}
    ranks = [Ranks.of(_group_of(name)) for name in groups]
    return max(ranks, key=lambda one: one.size, default=Ranks())


def _group_of(name: str) -> distributed.ProcessGroup:
    """The process group of a name, by which collective operations in a graph call it."""
    resolve: Any = vars(distributed_c10d)["_resolve_process_group"]
    group: distributed.ProcessGroup = resolve(name)
    return group
