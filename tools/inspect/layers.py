"""What every step mode does with every linear layer, read off the graphs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from calicache.export.artifact.manifest import TargetRecord
from calicache.graph_passes.describe.graphs import GraphView, ModelGraphs
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.sites.targets import CalibrationTarget

_LINEAR = "linear"
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")

Target = TargetRecord | CalibrationTarget


class LayerWork(StrEnum):
    """What a step does with a linear layer.

    FULL computes it; CALIBRATE corrects its anchor and REUSE returns it, alone or with the
    residual branch around it; SKIPPED does not run it, as what needs it reads kept values.
    """

    FULL = "full"
    CALIBRATE = "calibrate"
    REUSE = "reuse"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One linear layer of the model.

    Attributes:
        name: of the layer.
        target: the calibration target that it is a part of, or None.
        work: what a step does with it, by the name of the step's mode.
    """

    name: str
    target: str | None
    work: Mapping[str, LayerWork]


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
    return LayerWork.CALIBRATE if target.corrects else LayerWork.REUSE


def _weights(graph: GraphView) -> Mapping[str, str]:
    """Path of the weight of every linear layer, by the name of its node."""
    nodes = {node.name: node for node in graph.nodes}
    weights = {
        node.name: nodes[node.inputs[1]]
        for node in graph.nodes
        if node.op == _LINEAR and len(node.inputs) > 1
    }
    return {name: weight.module for name, weight in weights.items() if weight.op == "get_attr"}


def fold_layers(
    rows: Iterable[tuple[str, tuple[str, ...]]],
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Rows of a table whose names differ in one number and whose cells do not, as one row."""
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, cells in rows:
        alike.setdefault((_NUMBER.sub("*", name, count=1), cells), []).append(name)
    for (_, cells), names in alike.items():
        yield fold_names(names), cells


def fold_names(names: Sequence[str]) -> str:
    """Names that differ in one number as one: `blocks.{0-3,5}.attn.q`."""
    first = _NUMBER.search(names[0])
    if first is None or len(names) == 1:
        return ", ".join(names)
    numbers = [int(_NUMBER.search(name).group()) for name in names]  # type: ignore[union-attr]
    # Neighbours have the same distance from their places in the list.
    runs = [
        [number for _, number in members]
        for _, members in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    shown = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{names[0][: first.start()]}{{{shown}}}{names[0][first.end() :]}"
