"""What every step mode does with every linear layer, read off the graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from calicache.export.artifact.manifest import TargetRecord
from calicache.graph_passes.describe.graphs import GraphView, ModelGraphs, NodeView
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.sites.targets import CalibrationTarget
from calicache.tools.inspect.facts import LayerFacts, LayerWork

_LINEAR = "linear"


Target = TargetRecord | CalibrationTarget


def layer_facts(graphs: ModelGraphs, targets: Sequence[Target]) -> tuple[LayerFacts, ...]:
    """Every linear layer whose weight is a parameter, in graph order.

    Args:
        graphs: plain and by mode.
        targets: what CALIBRATE steps replace.
    """
    owner = {site: target for target in targets for site in target.sites}
    plain = _weights(graphs.plain)
    often = Counter(plain.values())
    by_mode = {mode: _weights(graph) for mode, graph in graphs.modes.items()}
    counts = {mode: Counter(weights.values()) for mode, weights in by_mode.items()}
    seen: Counter[str] = Counter()
    facts = []
    for node, weight in plain.items():
        path = weight.removesuffix(".weight")
        name = f"{path}@{seen[path]}" if seen[path] else path  # as find_sites names them
        seen[path] += 1
        target = owner.get(name)
        work = {}
        for mode, weights in by_mode.items():
            # A layer may run over rows, as another node; one of several calls has its own name.
            runs = counts[mode][weight] == often[weight] or node in weights
            work[mode.name] = LayerWork.FULL if runs else _without(mode, target)
        facts.append(LayerFacts(name, None if target is None else target.name, work))
    return tuple(facts)


def _without(mode: StepMode, target: Target | None) -> LayerWork:
    """What stands for a layer that does not run."""
    if mode is not StepMode.CALIBRATE or target is None:
        return LayerWork.SKIPPED
    return LayerWork.CALIBRATE if target.rank else LayerWork.REUSE


def _weights(graph: GraphView) -> Mapping[str, str]:
    """Path of the weight of every linear layer, by the name of its node."""
    nodes = {node.name: node for node in graph.nodes}
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == _LINEAR and len(node.inputs) > 1:
            weight: NodeView = nodes[node.inputs[1]]
            if weight.op == "get_attr":
                found[node.name] = weight.module
    return found
