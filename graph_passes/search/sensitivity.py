"""How far an error at a calibration target reaches the model's output: measured by perturbed runs.

A target's values are set back to those of an earlier step, which moves them along the increments
that calibration leaves out. A residual branch is followed to the output; a layer inside it only
to the branch's exits, since from there on the branch's own answer counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.surgery import graph_outputs
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.sites.sites import Sites
from calicache.graph_passes.sites.targets import CalibrationTarget

BACK = 2  # steps between a value and the one it is set back to
Probe = tuple[Sequence[str], Collection[str]]  # nodes set back, nodes that they are followed to


def sensitivities(
    captured: CapturedGraph,
    sites: Sites,
    targets: Sequence[CalibrationTarget],
    run: Run,
    steps: Sequence[int],
    meter: Meter | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """|change of the output|^2 over |change of the target|^2, by name of target and branch.

    Args:
        captured: the plain graph.
        sites: whose branches the targets are in.
        targets: linear ones; whole branches are measured in any case.
        run: a recorded run.
        steps: where to measure, each 2 or later.
        meter: counts the steps that this process measures.
        ranks: the processes that share the steps.
    """
    branch_of = {site.name: site.branch for site in sites.linears}
    exits = {branch.name: branch.exits for branch in sites.branches}
    ends = {str(node) for node in graph_outputs(captured.graph)}
    # A branch that is one layer has the name of its target: they are kept apart.
    probes: dict[str, Probe] = {f"branch {name}": (nodes, ends) for name, nodes in exits.items()}
    for target in targets:
        branch = branch_of[target.sites[0]]
        followed = ends if branch is None else exits.get(branch, ends)
        probes[target.name] = (target.nodes, followed)
    changes = ranks.map(partial(_changes, captured, probes, ends, run, meter), steps)
    gains = {name: _gain([of_step[name] for of_step in changes]) for name in probes}
    result = {name: gains[f"branch {name}"] for name in exits}
    for target in targets:  # through the branch, where there is one
        through = gains.get(f"branch {branch_of[target.sites[0]]}", 1.0)
        result[target.name] = gains[target.name] * through
    return result


def _changes(
    captured: CapturedGraph,
    probes: Mapping[str, Probe],
    ends: Collection[str],
    run: Run,
    meter: Meter | None,
    step: int,
) -> dict[str, tuple[float, float]]:
    """|change of what is followed|^2 and |change of the probe|^2 in a step, by name of a probe."""
    graph = _Forks(captured)
    watched = {node for nodes, _ in probes.values() for node in nodes}
    earlier = graph.run(_tensors(captured, run[step - BACK]), watched)
    tensors = _tensors(captured, run[step])
    forks = graph.fork(tensors, probes, earlier, {*watched, *ends})
    if meter:
        meter.add()
    return {name: (followed, own) for name, followed, own in forks}


def _gain(changes: Sequence[tuple[float, float]]) -> float:
    """Followed over own, of all steps together."""
    followed, own = (sum(values) for values in zip(*changes, strict=True))
    return followed / own if own else 0.0


class _Forks:
    """Runs the plain graph, and from any node on again with other values, few values held."""

    def __init__(self, captured: CapturedGraph) -> None:
        self.module = captured.module
        self.nodes = list(captured.graph.nodes)
        self.place = {node.name: k for k, node in enumerate(self.nodes)}
        self.last_use = {
            node.name: max((self.place[user.name] for user in node.users), default=k)
            for k, node in enumerate(self.nodes)
        }

    def run(self, tensors: Sequence[Tensor], watched: Collection[str]) -> dict[str, Tensor]:
        """Values of some nodes."""
        return self._go_on(0, len(self.nodes), {}, tensors, watched, {})

    def fork(
        self,
        tensors: Sequence[Tensor],
        probes: Mapping[str, Probe],
        earlier: Mapping[str, Tensor],
        watched: Collection[str],
    ) -> list[tuple[str, float, float]]:
        """For every probe: |change of what it is followed to|^2 and |its own change|^2."""
        plain = self.run(tensors, watched)
        starts: dict[int, list[str]] = {}
        for name, (nodes, _) in probes.items():
            starts.setdefault(min(self.place[node] for node in nodes), []).append(name)
        results = []
        interpreter, environment = self._start(tensors), dict[str, Any]()
        for k in range(len(self.nodes)):
            for name in starts.get(k, ()):
                nodes, followed = probes[name]
                other = {node: earlier[node] for node in nodes}
                stop = 1 + max(self.place[node] for node in followed)
                branch = self._go_on(k, stop, environment, tensors, followed, other)
                results.append((name, _change(plain, branch), _change(plain, other)))
            self._one(interpreter, k, environment, {})
        return results

    def _go_on(
        self,
        start: int,
        stop: int,
        environment: Mapping[str, Any],
        tensors: Sequence[Tensor],
        watched: Collection[str],
        other: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        interpreter, own = self._start(tensors), dict(environment)
        values: dict[str, Tensor] = {}
        for k in range(start, stop):
            value = self._one(interpreter, k, own, other)
            if self.nodes[k].name in watched:
                values[self.nodes[k].name] = value
        return values

    def _start(self, tensors: Sequence[Tensor]) -> fx.Interpreter:
        interpreter = fx.Interpreter(self.module, garbage_collect_values=False)
        interpreter.args_iter = iter(tensors)
        return interpreter

    def _one(
        self,
        interpreter: fx.Interpreter,
        k: int,
        environment: dict[str, Any],
        other: Mapping[str, Tensor],
    ) -> Any:
        """Compute a node, and forget the values that nothing needs any more."""
        node = self.nodes[k]
        if node.op == "output":
            return None
        if node.name in other:
            value: Any = other[node.name]
        else:
            interpreter.env = {source: environment[source.name] for source in node.all_input_nodes}
            with torch.no_grad():
                value = interpreter.run_node(node)
        environment[node.name] = value
        for source in (*node.all_input_nodes, node):
            if self.last_use[source.name] <= k:
                environment.pop(source.name, None)
        return value


def _tensors(captured: CapturedGraph, call: Mapping[str, Tensor]) -> list[Tensor]:
    return [value.to(captured.device) for value in call.values()]


def _change(plain: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    pairs = ((value, plain[name]) for name, value in other.items())
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
